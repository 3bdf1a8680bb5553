"""Two ranks with half of every block each give what one process gives, or refuse to."""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from personaspace.cluster.gang import Gang, OutOfStepError, Rendezvous
from personaspace.cluster.tensor import check_ranks
from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.store.errors import InputError
from tests.cluster.gang_processes import (
    GangProcesses,
    agreed,
    folder_of,
    halved,
    held,
    load,
    means,
    needs_deepspeed,
    responses,
)
from tests.extract.families import SITES, Family, relative_error
from tests.extract.quantised import fp8
from tests.extract.test_slicing import damaged
from tests.models import FAMILIES, tiny_checkpoint

WORKS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "mistral", "gpt_neox", "granite", "cohere2")
REFUSED = {
    "qwen3_moe": r"DeepSpeed leaves \d\d% of the weights of Qwen3MoeDecoderLayer \(layer 0\) whole on every rank",
    "mixtral": r"DeepSpeed leaves \d\d% of the weights of MixtralDecoderLayer \(layer 0\) whole on every rank",
    "deepseek_v3": r"DeepSpeed leaves \d\d% of the weights of DeepseekV3DecoderLayer \(layer 2\) whole on every rank",
    "phi3": r"DeepSpeed can't cut Phi3DecoderLayer \(layer 0\): ",
    "olmo2": r"DeepSpeed can't cut Olmo2DecoderLayer \(layer 0\): ",
    "gpt2": r"DeepSpeed can't cut GPT2Block \(layer 0\): AutoTP not supported for model",
    "gpt_oss": r"DeepSpeed can't cut GptOssDecoderLayer \(layer 0\): ",
}
ADVICE = (
    "Set cluster.sharding to `pipeline`, or to `offload`; for generation use an engine of its own with tensor "
    "parallel, such as vLLM."
)


@pytest.fixture(scope="module")
def gang() -> Iterator[GangProcesses]:
    processes = GangProcesses(2)
    yield processes
    assert processes.call(Gang.leave) == [None, None]
    processes.close()


@needs_deepspeed
@pytest.mark.parametrize("family", WORKS)
def test_same_activations_as_one_process(gang: GangProcesses, tmp_path: Path, family: str) -> None:
    tiny = Family.tiny(family, tmp_path)
    first, second = gang.call(means, tiny.checkpoint, SITES, "float32")
    assert relative_error(first, tiny.truth()) <= 1e-5
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_family_is_tried() -> None:
    assert sorted((*WORKS, *REFUSED)) == sorted(FAMILIES)


@needs_deepspeed
@pytest.mark.parametrize("family", REFUSED)
def test_what_deepspeed_cannot_cut_is_refused(gang: GangProcesses, tmp_path: Path, family: str) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path, family))))
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]) as error:
        gang.call(load, checkpoint)
    assert str(error.value).endswith(ADVICE)


@needs_deepspeed
def test_what_is_cut_wrongly_is_refused(gang: GangProcesses, tmp_path: Path) -> None:
    """Ranks that don't hold parts of one model: each finds its own blocks whole, but the sum is of no model."""
    paths = [tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with pytest.raises(UnsupportedModelError) as error:
        gang.call_each(load, [(resolve(ModelConfig(id=str(path))),) for path in paths])
    assert re.fullmatch(
        r"LlamaModel: DeepSpeed cuts LlamaDecoderLayer \(layer 0\) wrongly: \S+ differs by \d+\.\d% from the uncut one"
        r"\. " + re.escape(ADVICE),
        str(error.value),
    )


@needs_deepspeed
def test_missing_weight_is_refused(gang: GangProcesses, tmp_path: Path) -> None:
    whole = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path / "whole"))))
    broken = damaged(whole, tmp_path / "broken", without=r"model\.layers\.3\.mlp\.down_proj\.weight")
    with pytest.raises(UnsupportedModelError, match=r"1 weights of layers 3 to 3 are not in the checkpoint"):
        gang.call(load, broken)


@needs_deepspeed
def test_quantised_weights_are_refused(gang: GangProcesses, tmp_path: Path) -> None:
    checkpoint = fp8(tmp_path)
    with pytest.raises(
        InputError, match=r"quantised by fp8; such weights can't be used with cluster\.sharding: tensor"
    ):
        gang.call(load, checkpoint)


@needs_deepspeed
def test_bfloat16(gang: GangProcesses, tmp_path: Path) -> None:
    calm = Family.calm("llama", tmp_path)
    together, _ = gang.call(means, calm.checkpoint, SITES, "bfloat16")
    truth = calm.truth(dtype="bfloat16")
    alone = relative_error(calm.means(dtype="bfloat16"), truth)
    assert relative_error(together, truth) <= 2 * alone


@needs_deepspeed
@pytest.mark.parametrize("family", WORKS)
def test_same_text_as_one_process(gang: GangProcesses, tmp_path: Path, family: str) -> None:
    config = ModelConfig(id=str(tiny_checkpoint(tmp_path, family)))
    checkpoint = resolve(config)
    chat = ChatFormat(checkpoint, config)
    questions = ("Who are you?", "Tell me of the sea, the night, the stars.", "Why?")
    prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in questions]
    settings = GenerateConfig(max_new_tokens=24)
    engine = TransformersEngine(load_causal_lm(checkpoint, dtype="float32"), chat)
    alone = engine.generate(prompts, list(range(len(prompts))), settings)
    assert len({response.text for response in alone}) == len(prompts)
    assert gang.call(responses, checkpoint, prompts, settings) == [alone, alone]


@needs_deepspeed
def test_ranks_agree(gang: GangProcesses) -> None:
    assert gang.call(agreed) == [([0, 7], 1.0, 3.0)] * 2


@needs_deepspeed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_a_rank_holds_its_share_and_one_whole_block(gang: GangProcesses, tmp_path: Path) -> None:
    layers = 12
    folder = tiny_checkpoint(tmp_path, layers=layers, hidden=1024)
    gang.call(held, resolve(ModelConfig(id=str(folder))), 1)
    weights = folder_of(folder)
    for rank in gang.call(held, resolve(ModelConfig(id=str(folder))), layers):
        block = (weights - 2 * 4 * 1024 * 400) / layers / 4
        assert rank["block"] == pytest.approx(block / 2, rel=0.01)
        # The whole model would be 1; half of it, the embedding, and two blocks while one is cut.
        assert rank["grown"] < 0.8 * weights


@needs_deepspeed
def test_where_memory_runs_out_all_ranks_run_halves(gang: GangProcesses, tmp_path: Path) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path))))
    for (whole, plenty), (parts, scarce) in gang.call(halved, checkpoint, True):
        assert (whole, parts) == (1, 3)
        np.testing.assert_allclose(scarce, plenty, rtol=1e-4, atol=1e-5)


@needs_deepspeed
def test_a_rank_that_runs_out_of_memory_alone_does_not_go_on(tmp_path: Path) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path))))
    processes = GangProcesses(2)
    try:
        for rank, scarce in enumerate((True, False)):
            processes.send(rank, halved, checkpoint, scarce)
        error = processes.result(0)
        assert isinstance(error, OutOfStepError)
        assert str(error) == (
            "rank 0 of 2 ran out of memory where others did not. End the gang, start it again, and run the micro-batch "
            "in smaller parts."
        )
    finally:
        processes.close()


@needs_deepspeed
def test_a_rank_that_dies_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path))))
    processes = GangProcesses(2)
    try:
        processes.kill(1)
        began = time.monotonic()
        processes.send(0, load, checkpoint)
        error = processes.result(0)
        assert isinstance(error, Exception)
        assert re.search("(?i)connection|closed|peer", str(error))
        assert time.monotonic() - began < 60
    finally:
        processes.close()


def test_ranks_that_cannot_share_the_heads() -> None:
    config = LlamaConfig(num_attention_heads=64, num_key_value_heads=8)
    for ranks in (2, 3, 8):
        check_ranks("llama", config, ranks)
    with pytest.raises(InputError) as error:
        check_ranks("llama", config, 9)
    assert str(error.value) == (
        "llama has 8 key-value heads, so 9 ranks can't share them; at most 8 can, and evenly those that divide 8."
    )


def test_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError) as error:
        Gang(Rendezvous(), rank=0, ranks=2)
    assert str(error.value) == (
        "cluster.sharding: tensor needs DeepSpeed, which is not installed. Install personaspace[deepspeed] on every "
        "node, or set it to `pipeline`."
    )
