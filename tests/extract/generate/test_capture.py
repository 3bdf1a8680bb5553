"""Capture while generating: of every family, at every site, what a replay of the finished responses gives."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, GenerateConfig, ModelConfig
from personaspace.extract.generate.capture import check_capturable
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.packing import MicroBatch, Segment
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import Readout, plan_arrays
from personaspace.extract.slicing import Slice
from personaspace.extract.stage import Stage
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span
from tests.extract.families import READINGS
from tests.models import FAMILIES, reciting_checkpoint, tiny_checkpoint

REDUCTIONS = ("mean", "last_prompt", "first_4")
QUESTIONS = ("Who are you?", "Why?", "What should I do about a friend?", "Tell me of the sea, the night, the stars.")
CONFIG = GenerateConfig(max_new_tokens=12)
MEAN = Readout.of_arrays(plan_arrays(("resid_post",), ("mean",), None))
ALL = Readout.of_arrays(plan_arrays(("resid_post", "resid_pre"), REDUCTIONS, None))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", layers=2)


def load(
    folder: Path, dtype: Dtype = "float32", chat_template: str = "builtin"
) -> tuple[TransformersEngine, ChatFormat, Checkpoint]:
    config = ModelConfig(id=str(folder), dtype=dtype, chat_template=chat_template)
    checkpoint = resolve(config)
    chat = ChatFormat(checkpoint, config)
    return TransformersEngine(load_causal_lm(checkpoint, dtype=dtype), chat), chat, checkpoint


def captured(
    engine: TransformersEngine,
    chat: ChatFormat,
    checkpoint: Checkpoint,
    readout: Readout,
    config: GenerateConfig = CONFIG,
) -> tuple[list[list[int]], list[tuple[Response, Pooled | None]]]:
    engine.capture(checkpoint, readout, range(checkpoint.layers))
    prompts = [chat.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    return prompts, engine.generate_captured(prompts, range(len(prompts)), config)


def replayed(
    model: Slice, readout: Readout, prompts: Sequence[list[int]], responses: Sequence[Response]
) -> dict[int, Pooled]:
    """One plain forward pass per rollout."""
    found: dict[int, Pooled] = {}
    with Stage(model, sites=readout.sites) as stage:
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            whole = Span(turn=0, part="whole", start=len(prompt), stop=len(prompt) + len(response.token_ids))
            segments: tuple[Segment, ...] = readout.segments([whole])
            batch = MicroBatch(rows=(row,), token_ids=((*prompt, *response.token_ids),), segments=(segments,))
            found |= stage.forward(batch).pooled()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_a_replay_gives(tmp_path: Path, family: str) -> None:
    sites = READINGS[family].sites
    readout = Readout.of_arrays(plan_arrays(sites, REDUCTIONS, None))
    engine, chat, checkpoint = load(tiny_checkpoint(tmp_path, family, layers=3))
    model = engine.slice(checkpoint)
    prompts, found = captured(engine, chat, checkpoint, readout)
    responses = [response for response, _ in found]
    assert {response.finish_reason for response in responses} >= {"length"}
    engine_alone, _, _ = load(tmp_path)
    assert engine_alone.generate(prompts, range(len(prompts)), CONFIG) == responses
    for row, truth in replayed(model, readout, prompts, responses).items():
        pooled = found[row][1]
        assert pooled is not None
        assert pooled.counts_S.tolist() == truth.counts_S.tolist() == [len(responses[row].token_ids), 1, 4]
        scale = np.linalg.norm(truth.means_SD, axis=-1, keepdims=True)
        assert np.abs(pooled.means_SD - truth.means_SD).max() <= 1e-5 * scale.max()


def check(
    model: Slice, readout: Readout, prompts: Sequence[list[int]], found: Sequence[tuple[Response, Pooled | None]]
) -> None:
    """Rows that say something are what a replay gives."""
    said = [row for row, (response, _) in enumerate(found) if response.token_ids]
    truths = replayed(model, readout, [prompts[row] for row in said], [found[row][0] for row in said])
    for place, row in enumerate(said):
        pooled, truth = found[row][1], truths[place]
        assert pooled is not None
        assert pooled.counts_S.tolist() == truth.counts_S.tolist()
        np.testing.assert_allclose(pooled.means_SD, truth.means_SD, atol=1e-5 * np.abs(truth.means_SD).max())


@settings(max_examples=25, deadline=None)
@given(stops=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 13)), max_size=4), tokens=st.integers(1, 14))
def test_rows_end_whenever_they_like(tiny: Path, stops: set[tuple[int, int]], tokens: int) -> None:
    """Each at its own stop token, or cut off; a finished row's states count no more."""
    (tiny / "generation_config.json").unlink(missing_ok=True)
    engine, chat, _ = load(tiny)
    prompts = [chat.encode_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    unstopped = engine.generate(prompts, range(len(prompts)), GenerateConfig(max_new_tokens=14))
    stop_ids = sorted({unstopped[row].token_ids[place % len(unstopped[row].token_ids)] for row, place in stops})
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    engine, chat, checkpoint = load(tiny)
    model = engine.slice(checkpoint)
    _, found = captured(engine, chat, checkpoint, MEAN, GenerateConfig(max_new_tokens=tokens))
    for whole, (response, _) in zip(unstopped, found, strict=True):
        end = next((i for i, token in enumerate(whole.token_ids) if token in stop_ids), len(whole.token_ids))
        assert response.token_ids == whole.token_ids[: min(end, tokens)]
    check(model, MEAN, prompts, found)


@pytest.mark.parametrize("tokens", [3, 6, 7, 8, 9, 10, 11, 30])
def test_what_belongs_to_a_stop_string_is_taken_back(tmp_path: Path, tokens: int) -> None:
    folder = reciting_checkpoint(tmp_path, ":", " I see the old house.\nUser:", chat_template=None)
    engine, chat, checkpoint = load(folder, chat_template="plain")
    model = engine.slice(checkpoint)
    prompts, found = captured(engine, chat, checkpoint, ALL, GenerateConfig(max_new_tokens=tokens))
    texts = {response.text for response, _ in found}
    assert len(texts) == 1
    assert "User" not in texts.pop() or tokens < 30
    check(model, ALL, prompts, found)


def test_in_bfloat16_it_is_what_a_replay_gives_within_its_rounding(tmp_path: Path) -> None:
    engine, chat, checkpoint = load(tiny_checkpoint(tmp_path, layers=4), dtype="bfloat16")
    model = engine.slice(checkpoint)
    prompts, found = captured(engine, chat, checkpoint, MEAN)
    responses = [response for response, _ in found]
    for row, truth in replayed(model, MEAN, prompts, responses).items():
        pooled = found[row][1]
        assert pooled is not None
        ours, theirs = pooled.means_SD[0, :, 0], truth.means_SD[0, :, 0]
        cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert cosines.min() > 0.999


def test_what_is_known_only_afterwards_is_refused() -> None:
    readout = Readout.of_arrays(plan_arrays(("resid_post",), ("mean", "turns"), None))
    with pytest.raises(InputError, match=r"generate\.capture: the reductions `turns` and `parts` need finished"):
        check_capturable(readout, CONFIG)
    with pytest.raises(InputError, match=r"generate\.capture: only with static batching"):
        check_capturable(MEAN, GenerateConfig(batching="continuous"))
    check_capturable(MEAN, GenerateConfig(engine="vllm"))
    with pytest.raises(
        InputError, match=r"^generate\.capture: of vLLM's models only resid_post can be read, and extract"
    ):
        check_capturable(ALL, GenerateConfig(engine="vllm"))
