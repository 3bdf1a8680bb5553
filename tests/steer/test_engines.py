"""Engines sample and capture steered, as a replay of the finished responses with the same change does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.extract.config import GenerateConfig
from personaspace.extract.packing import MicroBatch
from personaspace.extract.reductions import Readout, plan_arrays
from personaspace.extract.stage import Stage
from personaspace.steer.interventions import Intervention, layer_hooks
from tests.extract.generate.test_capture import load
from tests.extract.generate.test_transformers_engine import PROMPTS, SEEDS
from tests.models import tiny_checkpoint

CONFIG = GenerateConfig(max_new_tokens=12)
READOUT = Readout.of_arrays(plan_arrays(("resid_post", "mlp_out"), ("mean", "last_prompt", "first_4"), None))
VECTOR_D = np.random.default_rng(0).normal(size=32).astype(np.float32)


def hooks(positions: Any = "all", value: float = 30.0) -> Any:
    change: dict[str, Any] = {"layer": 1, "vector_D": VECTOR_D, "positions": positions}
    return layer_hooks([Intervention(method="ablate", **change), Intervention(method="add", value=value, **change)])


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_what_is_captured_is_what_a_steered_replay_gives(tmp_path: Path, family: str, positions: Any) -> None:
    engine, chat, checkpoint = load(tiny_checkpoint(tmp_path, family, layers=3))
    prompts = [chat.encode_prompt(messages) for messages in PROMPTS]
    plain = engine.generate(prompts, SEEDS, CONFIG)
    engine.capture(checkpoint, READOUT, range(3))
    engine.intervene(checkpoint, hooks(positions))
    found = engine.generate_captured(prompts, SEEDS, CONFIG)
    assert [response for response, _ in found] != plain
    replayed = engine.replay({row: (prompts[row], found[row][0]) for row in range(len(prompts))})
    for row, (response, pooled) in enumerate(found):
        assert pooled is not None
        np.testing.assert_allclose(pooled.means_SD, replayed[row].means_SD, atol=1e-4)
        tokens = (*prompts[row], *response.token_ids)
        batch = MicroBatch(
            rows=(0,), token_ids=(tokens,), segments=(((len(prompts[row]), len(tokens)),),), begins=(len(prompts[row]),)
        )
        with Stage(engine.slice(checkpoint), hooks=hooks(positions)) as stage:
            alone = stage.forward(batch).pooled()[0].means_SD
        np.testing.assert_allclose(pooled.means_SD[0, :, 0], alone[0, :, 0], atol=1e-4)
        unit_D = VECTOR_D / np.linalg.norm(VECTOR_D)
        assert alone[0, 1, 0] @ unit_D == pytest.approx(30.0, rel=1e-4)
        read_last_prompt = pooled.means_SD[0, 1, 1] @ unit_D
        assert (read_last_prompt == pytest.approx(30.0, rel=1e-4)) == (positions == "all")


def test_continuous_batching_gives_the_same(tmp_path: Path) -> None:
    engine, chat, checkpoint = load(tiny_checkpoint(tmp_path, layers=3))
    prompts = [chat.encode_prompt(messages) for messages in PROMPTS]
    engine.intervene(checkpoint, hooks())
    continuous = GenerateConfig(max_new_tokens=12, batching="continuous")
    assert engine.generate(prompts, SEEDS, continuous) == engine.generate(prompts, SEEDS, CONFIG)


def test_an_idle_change_costs_nothing(tmp_path: Path) -> None:
    """Not a hook is left, and not a token changes."""
    engine, chat, checkpoint = load(tiny_checkpoint(tmp_path, layers=3))
    prompts = [chat.encode_prompt(messages) for messages in PROMPTS]
    plain = engine.generate(prompts, SEEDS, CONFIG)
    engine.intervene(checkpoint, layer_hooks([Intervention(method="add", layer=1, vector_D=VECTOR_D)]))
    assert engine.generate(prompts, SEEDS, CONFIG) == plain
    modules = engine.slice(checkpoint).decoder.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
