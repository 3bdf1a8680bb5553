"""What is captured from vLLM, in its own environment (`make test-vllm`), beside transformers' own forward pass."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from personaspace.extract.config import GenerateConfig, Positions, VllmConfig
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.vllm_worker import COMPARED
from personaspace.extract.hooks import LayerHook
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import Readout, plan_arrays
from personaspace.steer.interventions import Intervention
from personaspace.store.errors import InputError
from tests.extract.generate.test_vllm_engine import HIDDEN, SEEDS, SYSTEM, Tiny, needs_vllm
from tests.models import tiny_checkpoint

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
LAYERS = (0, 2)
"""Of four: what transformers tells as the last one's states is normalised."""
CONFIG = GenerateConfig(engine="vllm", max_new_tokens=60, temperature=2.0)
READOUT = Readout.of_arrays(plan_arrays(("resid_post",), ("mean", "last_prompt", "first_5"), None))


States = Callable[[Sequence[int]], NDArray[np.float32]]
"""Token ids -> what passes after each of LAYERS ``(L, T, D)``."""


def hidden_states(tiny: Tiny, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> States:
    """``change``: of what leaves the first block, in the unmodified model."""
    # Of the fused kernels some leave out what Gemma 2 does to its attention scores.
    model = AutoModelForCausalLM.from_pretrained(
        tiny.checkpoint.source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if change is not None:
        block = model.get_decoder().layers[0]
        block.register_forward_hook(
            lambda _, __, output: (
                change(output) if isinstance(output, torch.Tensor) else (change(output[0]), *output[1:])
            )
        )

    @torch.inference_mode()
    def states(token_ids: Sequence[int]) -> NDArray[np.float32]:
        found = model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
        return np.stack([found[layer + 1][0].numpy() for layer in LAYERS])

    return states


def assert_read(pooled: Pooled, states: States, prompt: Sequence[int], response: Response) -> None:
    """The sums are those over the response, the prompt's last token, and the response's first five tokens."""
    states_LTD = states([*prompt, *response.token_ids])
    first, length = len(prompt), len(response.token_ids)
    spans = ((first, first + length), (first - 1, first), (first, first + min(5, length)))
    assert pooled.counts_S.tolist() == [stop - start for start, stop in spans]
    truth_LSD = np.stack([states_LTD[:, start:stop].sum(axis=1) for start, stop in spans], axis=1)
    np.testing.assert_allclose(pooled.sums_SD[0], truth_LSD, rtol=1e-3, atol=1e-3)


@needs_vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_a_pass_of_transformers_gives(tmp_path: Path, family: str) -> None:
    tiny = Tiny(tiny_checkpoint(tmp_path, family, layers=4, hidden=HIDDEN), system=SYSTEM)
    truth = hidden_states(tiny)  # First: vLLM changes classes of transformers.
    # Few at once, so that some wait and some are done before others begin.
    with tiny.vllm(VllmConfig(cache_gib=0.1, max_sequences=5), opened=True) as engine:
        engine.capture(tiny.checkpoint, READOUT, LAYERS)
        alone = engine.generate(tiny.prompts, SEEDS, CONFIG)
        found = engine.generate_captured(tiny.prompts, SEEDS, CONFIG)
        sampled = {row: (tiny.prompts[row], response) for row, (response, _) in enumerate(found)}
        replayed = engine.replay(sampled)
    assert [response for response, _ in found] == alone
    assert {response.finish_reason for response, _ in found} == {"length", "stop"} or family != "llama"
    for row, (prompt, response) in sampled.items():
        for pooled in (found[row][1], replayed[row]):
            assert pooled is not None
            assert_read(pooled, truth, prompt, response)


@needs_vllm
def test_every_architecture_that_is_read_was_compared() -> None:
    found = set()
    for family in FAMILIES:
        name = type(AutoConfig.for_model(family)).__name__
        found.add(name.removesuffix("Config").removesuffix("Text") + "ForCausalLM")
    assert found == COMPARED


@needs_vllm
def test_what_was_put_off_and_begun_anew_is_left_to_a_second_pass(tmp_path: Path) -> None:
    """A cache for a few rollouts only: some lose their place, and are read again from the start."""
    tiny = Tiny(tiny_checkpoint(tmp_path, layers=4, hidden=HIDDEN), system=SYSTEM)
    truth = hidden_states(tiny)
    with tiny.vllm(VllmConfig(cache_gib=0.003), opened=True) as engine:
        engine.capture(tiny.checkpoint, READOUT, LAYERS)
        found = engine.generate_captured(tiny.prompts, SEEDS, GenerateConfig(engine="vllm", max_new_tokens=200))
    assert 0 < sum(pooled is None for _, pooled in found) < len(found)
    for prompt, (response, pooled) in zip(tiny.prompts, found, strict=True):
        if pooled is not None:
            assert_read(pooled, truth, prompt, response)


@needs_vllm
def test_an_architecture_that_was_not_compared_is_refused(tmp_path: Path) -> None:
    tiny = Tiny(tiny_checkpoint(tmp_path, "gpt_neox", layers=4, hidden=HIDDEN))
    with tiny.vllm(opened=True) as engine, pytest.raises(InputError, match=r"^generate\.capture: vLLM's GPTNeoX"):
        engine.capture(tiny.checkpoint, READOUT, LAYERS)


@needs_vllm
@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_steered_model_is_what_transformers_steered_gives(tmp_path: Path, family: str, positions: Positions) -> None:
    """Several rollouts of unlike lengths at once, so that prompts and responses share a step."""
    tiny = Tiny(tiny_checkpoint(tmp_path, family, layers=4, hidden=HIDDEN), system=SYSTEM)
    vector_D = np.random.default_rng(0).normal(size=HIDDEN).astype(np.float32)
    change = Intervention(method="add", layer=0, vector_D=vector_D, value=20.0)
    begin = [0]

    def changed(h_BTD: torch.Tensor) -> torch.Tensor:
        return torch.cat([h_BTD[:, : begin[0]], change(h_BTD[:, begin[0] :])], dim=1)

    truth = hidden_states(tiny, changed)  # First: vLLM changes classes of transformers.
    with tiny.vllm(VllmConfig(cache_gib=0.1, max_sequences=5), opened=True) as engine:
        before = engine.generate(tiny.prompts, SEEDS, CONFIG)
        engine.intervene(tiny.checkpoint, [LayerHook(layer=0, change=change, positions=positions)])
        engine.capture(tiny.checkpoint, READOUT, LAYERS)
        found = engine.generate_captured(tiny.prompts, SEEDS, CONFIG)
        replayed = engine.replay({row: (tiny.prompts[row], response) for row, (response, _) in enumerate(found)})
        # What was a response is part of the prompt in the next turn.
        prompts = [[*tiny.prompts[row], *response.token_ids, 5] for row, (response, _) in enumerate(found)]
        second = engine.generate_captured(prompts, SEEDS, CONFIG)
    assert [response for response, _ in found] != before
    for row, (response, pooled) in enumerate(found):
        begin[0] = 0 if positions == "all" else len(tiny.prompts[row])
        for read in (pooled, replayed[row]):
            assert read is not None
            assert_read(read, truth, tiny.prompts[row], response)
        response, pooled = second[row]
        assert pooled is not None
        begin[0] = 0 if positions == "all" else len(prompts[row])
        assert_read(pooled, truth, prompts[row], response)
