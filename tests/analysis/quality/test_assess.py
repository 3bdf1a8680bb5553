"""Flaws of stored rollouts: each is found where it is, counted by role, prompt and question, and put on the axis."""

from pathlib import Path

import numpy as np
import pytest

from personaspace.analysis.quality.assess import UNITS_AT_A_TIME, assess, with_flaws
from personaspace.analysis.quality.flaws import NAMES
from personaspace.analysis.quality.words import outstanding, percent, summary, warnings
from personaspace.store import open_run, select
from personaspace.store.errors import InputError
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from tests.analysis.quality.responses import CONFESSION, LOOP, PLAIN, REFUSAL, part, write
from tests.store.small_runs import create


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def rows_of(folder: LocalFolder) -> dict[str, list[int]]:
    """Flaw -> rows that have it."""
    quality = assess(folder)
    return {name: quality.row_N[quality.flawed_N[name]].tolist() for name in NAMES if quality.flawed_N[name].any()}


def test_each_flaw_is_found_where_it_is(folder: LocalFolder) -> None:
    responses = [f"{number}: {PLAIN}" for number in range(12)]
    responses[0] = CONFESSION  # of `default`, which is an AI
    responses[2], responses[4], responses[5], responses[6] = " \n", LOOP, REFUSAL, CONFESSION
    responses[8], responses[9] = f"\n{responses[1]} ", " "
    write(folder, responses, {7: {"finish_reason": "length"}, 9: {"finish_reason": "length"}})
    assert rows_of(folder) == {
        "empty": [2, 9],
        "truncated": [7, 9],
        "looping": [4],
        "refused": [5],
        "broke_role": [6],
        "duplicate": [6, 8],
    }


def test_a_thought_without_an_answer(folder: LocalFolder) -> None:
    whole, think, answer = part("whole"), part("think"), part("answer")
    later = [part(name, turn=1) for name in ("whole", "think")]
    spans = {
        0: [whole, think, answer],
        1: [whole, think],
        2: [whole, answer],
        3: [],
        4: [whole, answer, *later],
        5: [whole, think, part("whole", turn=1), part("answer", turn=1)],
    }
    write(folder, [f"{row}: {PLAIN}" for row in range(6)], {row: {"spans": value} for row, value in spans.items()})
    assert rows_of(folder) == {"only_thought": [1, 4]}


def test_answers_in_a_script_that_nobody_used(folder: LocalFolder) -> None:
    chinese, asked = "海港很安静最后一条船进来的时候", "你是谁"
    russian, mixed = "\u041c\u043e\u0440\u0435 \u0442\u0438\u0445\u043e\u0435", "\u041a\u0442\u043e \u0442\u044b? Who?"
    responses = [
        chinese,
        chinese[:-1],
        f"{PLAIN} They call it 海.",
        russian,
        "Über Öl? Ça va, naïve façade ✓ 🙂",
        PLAIN,
    ]
    write(folder, responses, {1: {"asked": asked}, 3: {"asked": mixed}, 5: {"asked": asked}})
    assert rows_of(folder) == {"other_script": [0, 5]}


def test_rollouts_that_nobody_sampled_do_not_count(folder: LocalFolder) -> None:
    write(folder, [PLAIN, "", "x"], {1: {"finish_reason": "quarantined"}})
    quality = assess(folder)
    assert quality.unsampled == 1
    assert quality.row_N.tolist() == [0, 2]
    assert quality.overall()["empty"].total == 2


def test_groups_by_role_prompt_and_question(folder: LocalFolder) -> None:
    responses = [f"{number}: {PLAIN}" for number in range(48)]
    responses[4], responses[6] = REFUSAL, LOOP  # poet, prompt 0
    for row in (3, 9):  # question 0, of default and hacker
        responses[row] = " "
    write(folder, responses)
    quality = assess(folder)
    assert quality.overall()["flawed"].count == 4
    by_role = {group.name: group for group in quality.groups("role")}
    assert next(iter(by_role)) == "poet", "two of four are flawed"
    assert by_role["poet"].kind == "dramatic"
    assert {name: share.count for name, share in by_role["poet"].shares.items() if share.count} == {
        "refused": 1,
        "looping": 1,
        "flawed": 2,
    }
    assert [by_role[role].shares["flawed"].total for role in ("default", "poet", "hacker")] == [4, 4, 40]
    worst = quality.groups("prompt")[0]
    assert (worst.name, worst.prompt, worst.shares["flawed"].count) == ("poet 0", 0, 2)
    by_question = {group.name: group for group in quality.groups("question")}
    assert by_question["q0"].shares["empty"].count == 2
    assert by_question["q0"].text == "q0?"
    assert sum(group.shares["flawed"].total for group in by_question.values()) == 48


def test_words(folder: LocalFolder) -> None:
    responses = [REFUSAL if row < 8 and row >= 4 else f"{row}: {PLAIN}" for row in range(400)]
    write(folder, responses, {row: {"finish_reason": "length"} for row in range(200)})
    quality = assess(folder)
    assert summary(quality)[:2] == [
        "  50% (45-55%) were cut off: 200",
        "   1% (0-3%) begin with a refusal: 4",
    ]
    advice = "only beginnings are averaged; raise generate.max_new_tokens if whole answers matter"
    assert warnings(quality) == [
        f"warning: 50% of 400 responses were cut off; {advice}",
        "warning: some roles more than others: refused: poet 100%; duplicate: poet 75%",
    ]
    assert outstanding(quality.groups("role")) == ["refused: poet 100%", "duplicate: poet 75%"]
    assert [percent(share) for share in (0, 0.001, 0.5, 0.999, 1)] == ["0%", "<1%", "50%", ">99%", "100%"]


def test_some_units_stand_for_all_and_progress_is_told(folder: LocalFolder) -> None:
    write(folder, [f"{number}: {PLAIN}" for number in range(4 * (UNITS_AT_A_TIME + 4))])
    told: list[tuple[int, int]] = []
    whole = assess(folder, progress=lambda *state: told.append(state))
    assert told == [(UNITS_AT_A_TIME, UNITS_AT_A_TIME + 4), (UNITS_AT_A_TIME + 4, UNITS_AT_A_TIME + 4)]
    assert whole.row_N.tolist() == list(range(80))
    some = assess(folder, at_most=9)
    assert some.row_N.tolist() == [0, 1, 2, 3, 76, 77, 78, 79], "two units, from both ends"


def test_flaws_as_coordinates(folder: LocalFolder) -> None:
    responses = [f"{number}: {PLAIN}" for number in range(10)]
    responses[5], responses[6] = LOOP, REFUSAL
    write(folder, responses)
    run = with_flaws(open_run(folder))
    assert select(run, role="poet", without=["looping", "refused"])["rollout_id"].values.tolist() == [
        f"{row:016x}" for row in (4, 7)
    ]
    kept = select(run, without="looping")
    assert kept.sizes["rollout"] == 9
    assert np.isfinite(kept["resid_post_mean"].values).all()
    with pytest.raises(InputError, match=r"^without: the run has no boolean coordinate 'sad'; with_flaws\(run\) adds"):
        select(run, without="sad")
    with pytest.raises(InputError, match="no boolean coordinate 'looping'"):
        select(open_run(folder), without="looping")


def test_no_rollouts_yet(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=print) as lease:
        create(lease.fence)
    with pytest.raises(InputError, match=r"run: no rollouts yet; run `generate` first\.$"):
        assess(folder)
