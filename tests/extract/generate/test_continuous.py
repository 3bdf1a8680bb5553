"""Continuous batching: the responses of static batches, whatever the family, however they end."""

from dataclasses import replace
from pathlib import Path

import pytest

from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate import continuous
from personaspace.extract.generate.engine import Response
from personaspace.store.errors import WorkerError
from tests.extract.generate.test_transformers_engine import CONFIG, generate, load
from tests.models import reciting_checkpoint, tiny_checkpoint

CONTINUOUS = replace(CONFIG, batching="continuous")
ROWS = list(range(12))


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt_neox", "phi3", "olmo2"]
)
def test_in_float32_the_responses_are_those_of_static_batches(tmp_path: Path, family: str) -> None:
    engine, chat = load(tiny_checkpoint(tmp_path, family, layers=2))
    static = generate(engine, chat, ROWS)
    assert generate(engine, chat, ROWS, CONTINUOUS) == static
    assert generate(engine, chat, ROWS[::-1], CONTINUOUS) == static[::-1]
    assert generate(engine, chat, ROWS) == static, "the model is as it was"


def test_more_requests_than_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small cache lets few in; the others wait, and come out the same."""
    engine, chat = load(tiny_checkpoint(tmp_path, layers=2))
    sized = continuous._batching

    def small(*arguments: object) -> object:
        config = sized(*arguments)  # type: ignore[arg-type]
        config.num_blocks, config.max_requests_per_batch = 8, 3
        return config

    monkeypatch.setattr(continuous, "_batching", small)
    assert generate(engine, chat, ROWS, CONTINUOUS) == generate(engine, chat, ROWS)


def test_responses_end_where_the_turn_does(tmp_path: Path) -> None:
    engine, chat = load(reciting_checkpoint(tmp_path, "\n", "I see the old house.<|im_end|>"))
    said = "I see the old house."
    ended = Response(token_ids=chat.encode_text(said), text=said, finish_reason="stop")
    assert generate(engine, chat, [0, 1], CONTINUOUS) == [ended] * 2
    [cut] = generate(engine, chat, [0], GenerateConfig(max_new_tokens=3, batching="continuous"))
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")


def test_stop_strings_are_cut(tmp_path: Path) -> None:
    engine, chat = load(reciting_checkpoint(tmp_path, ":", " I see the old house.\nUser:", None), "plain")
    [response] = generate(engine, chat, [0], CONTINUOUS)
    assert (response.text, response.finish_reason) == (" I see the old house.", "stop")


def test_what_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, chat = load(tiny_checkpoint(tmp_path, layers=2))
    monkeypatch.setattr(continuous, "_ROWS", 4)
    with pytest.raises(WorkerError, match=r"generate\.batch_rows: 12 rollouts at once; continuous batching takes 4\."):
        generate(engine, chat, ROWS, CONTINUOUS)
