"""Loops: what the measure finds in made texts, and the invariants that hold for any text."""

import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis.quality.repetition import LEAST_WORDS, LOOPING_SHARE, RUN_WORDS, repeated_share

REPOSITORY = Path(__file__).parents[3]
PROSE = (
    "The harbour was quiet when the last boat came in, and the old woman who sold nets had already gone home. Nobody "
    "spoke of the storm that evening, though everyone had seen the sky turn the colour of slate over the western hills."
)
words = st.text("abcdefgh", min_size=1, max_size=5)


def share(text: str) -> float:
    return float(repeated_share(pa.array([text]))[0])


def test_share_counts_the_runs_of_six_words_that_came_before() -> None:
    sixteen = " ".join(f"w{number}" for number in range(16))
    assert share(sixteen) == 0
    # 32 words have 27 runs; the last eleven are those of the first sixteen words.
    assert share(f"{sixteen} {sixteen}") == pytest.approx(11 / 27)


@pytest.mark.parametrize(
    "loop",
    [
        "A just " + "just " * 60,
        PROSE + " It was a sacred way, a sacred thing," + " a sacred way," * 15,
        "I would stop time for one hour, the only time you will ever have. " * 4,
        "我是一个幽灵。" * 8,
        "ฉันเป็นผี " * 8,
    ],
)
def test_loops_are_found(loop: str) -> None:
    assert share(loop) >= LOOPING_SHARE


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        PROSE,
        PROSE.upper(),
        "No, no, no, no, no, no, no.",
        "| role | share |\n|---|---|\n" + "".join(f"| {word} | {len(word)} |\n" for word in PROSE.split()),
        "\n".join(f"{number}. {word}" for number, word in enumerate(PROSE.split())),
        "海港很安静最后一条船进来的时候卖网的老妇人已经回家了。那天晚上没有人谈起暴风雨。",
    ],
)
def test_prose_tables_and_lists_are_no_loops(text: str) -> None:
    assert share(text) < LOOPING_SHARE / 2


def test_texts_are_judged_each_by_itself() -> None:
    texts = [PROSE, PROSE, "", "the door to " * 30, PROSE]
    assert repeated_share(pa.array(texts)).tolist() == [share(text) for text in texts]
    assert repeated_share(pa.array([], type=pa.string())).tolist() == []


def test_documents_of_the_project_are_no_loops() -> None:
    """Nearly: a table may name the same things in several of its rows."""
    pages = [file.read_text(encoding="utf-8").split() for file in sorted((REPOSITORY / "docs").glob("*.md"))]
    windows = [" ".join(page[at : at + 60]) for page in pages for at in range(0, len(page) - 59, 60)]
    assert len(windows) > 200
    assert (repeated_share(pa.array(windows)) >= LOOPING_SHARE).mean() < 0.02


@given(st.lists(words, min_size=1, max_size=12), st.integers(1, 8))
def test_a_loop_that_goes_on_is_more_of_a_loop(loop: list[str], more: int) -> None:
    often = -(-(LEAST_WORDS + RUN_WORDS) // len(loop)) + 1
    assert share(" ".join(loop * often)) <= share(" ".join(loop * (often + more)))


@given(st.lists(words, max_size=80))
def test_share_is_a_share_and_ignores_case_and_punctuation(text: list[str]) -> None:
    found = share(" ".join(text))
    assert 0 <= found < 1
    assert share(", ".join(text).upper() + "!") == found


@given(st.permutations(sorted(set(PROSE.split()))))
def test_distinct_words_in_any_order_are_no_loop(order: list[str]) -> None:
    assert share(" ".join(order)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_shuffling_a_loop_of_prose_ends_it(seed: int) -> None:
    often = PROSE.split() * 4
    assert share(" ".join(often)) > 0.7
    random.Random(seed).shuffle(often)
    assert share(" ".join(often)) < 0.02


@given(st.lists(words, min_size=30, max_size=60, unique=True), st.integers(LEAST_WORDS, 60))
def test_saying_everything_twice_is_a_loop(text: list[str], length: int) -> None:
    said = text[:length]
    assert share(" ".join(said)) == 0
    assert share(" ".join(said * 2)) >= LOOPING_SHARE
