"""A stage whose rollouts see their neighbours is refused before it is used; every other one passes."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from personaspace.extract.anatomy import UnsupportedModelError, check_supported
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, ModelConfig
from personaspace.extract.hooks import LayerHook
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage
from tests.extract.families import READINGS
from tests.extract.others import other_checkpoint
from tests.models import FAMILIES, tiny_checkpoint

PACKING = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
SLICES: list[tuple[int, int, Dtype]] = [
    (0, 6, "float32"),
    (0, 6, "bfloat16"),
    (0, 1, "float32"),
    (1, 5, "float32"),
    (5, 6, "float32"),
]
PACKED_SEE_EACH_OTHER = (
    "{} attention: a rollout's states differ by N% when others share its micro-batch, so packed rollouts see each "
    "other. Set extract.packing to `padded`, or model.attention to `flash_attention_2`."
)
BIDIRECTIONAL = (
    "{}: a rollout's states differ by N% when only what follows it changes (bidirectional attention, for example); "
    "only causal decoders can be used."
)
SEVERAL_STREAMS = (
    "Gemma3nTextModel: its blocks can't be run as those of a decoder: hidden states of shape (2, 5, 23, 32), expected "
    "(5, 23, 32)"
)
Record = Callable[[str, object], None]


def check(
    checkpoint: Checkpoint, first: int = 0, stop: int = 6, dtype: Dtype = "float32", *, packed: bool = False
) -> None:
    with Stage(load_slice(checkpoint, first=first, stop=stop, dtype=dtype), last=stop == 6) as stage:
        check_stage(stage, packed=packed)


def refusal(work: Callable[..., None], *arguments: object, **options: object) -> str:
    with pytest.raises(UnsupportedModelError) as error:
        work(*arguments, **options)
    return str(error.value)


def unmeasured(message: str) -> str:
    """The message with N in place of what was measured."""
    return re.sub(r"\d+\.\d%", "N%", message)


@pytest.mark.parametrize("family", FAMILIES)
@PACKING
def test_every_family_at_every_stage(tmp_path: Path, family: str, packed: bool) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path, family))))
    for first, stop, dtype in SLICES:
        if packed and READINGS[family].unpackable:
            message = refusal(check, checkpoint, first, stop, dtype, packed=True)
            assert unmeasured(message) == PACKED_SEE_EACH_OTHER.format("GptOssModel with eager")
        else:
            check(checkpoint, first, stop, dtype, packed=packed)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", "T5Model: an encoder-decoder; only decoder-only language models can be used."),
        ("bert", BIDIRECTIONAL.format("BertModel")),
        ("modernbert", BIDIRECTIONAL.format("ModernBertModel")),
        ("gemma3n_text", SEVERAL_STREAMS),
    ],
)
def test_refused(tmp_path: Path, model_type: str, message: str, record_property: Record) -> None:
    """benchmarks/families.py makes docs/models.md from what is recorded here."""

    def use(checkpoint: Checkpoint) -> None:
        check_supported(checkpoint)
        check(checkpoint)

    found = refusal(use, other_checkpoint(tmp_path, model_type))
    record_property("refused", model_type)
    record_property("message", found)
    assert unmeasured(found) == message


@pytest.mark.parametrize("slice_", [(1, 5), (5, 6)])
def test_a_stage_in_the_middle_is_checked_with_received_states(tmp_path: Path, slice_: tuple[int, int]) -> None:
    first, stop = slice_
    assert unmeasured(refusal(check, other_checkpoint(tmp_path, "bert"), first, stop)) == BIDIRECTIONAL.format(
        "BertModel"
    )


def test_mamba_is_causal_but_does_not_pack(tmp_path: Path, record_property: Record) -> None:
    mamba = other_checkpoint(tmp_path, "mamba")
    for first, stop, dtype in SLICES:
        check(mamba, first, stop, dtype)
    found = refusal(check, mamba, packed=True)
    record_property("family", "mamba")
    record_property("packed_refused", READINGS["mamba"].unpackable)
    record_property("packed_message", found)
    assert unmeasured(found) == PACKED_SEE_EACH_OTHER.format("MambaModel with eager")


@PACKING
def test_llama4_passes(tmp_path: Path, packed: bool) -> None:
    llama4 = other_checkpoint(tmp_path, "llama4_text")
    for first, stop, dtype in SLICES:
        check(llama4, first, stop, dtype, packed=packed)


def look_ahead(h_BTD: torch.Tensor) -> torch.Tensor:
    """Some of each token's states reaches the token before it, so that only a rollout's last one sees another's."""
    return h_BTD + 0.1 * h_BTD.roll(-1, dims=1)


def mix_all(h_BTD: torch.Tensor) -> torch.Tensor:
    return h_BTD + h_BTD.mean(dim=(0, 1))


@pytest.mark.parametrize(
    ("dtype", "leak"), [(dtype, leak) for dtype in ("float32", "bfloat16", "float16") for leak in (look_ahead, mix_all)]
)
@PACKING
def test_a_leak_is_found(
    llama: Checkpoint, dtype: Dtype, leak: Callable[[torch.Tensor], torch.Tensor], packed: bool
) -> None:
    model = load_slice(llama, first=0, stop=6, dtype=dtype)
    with Stage(model, hooks=[LayerHook(layer=2, change=leak)]) as stage:
        message = unmeasured(refusal(check_stage, stage, packed=packed))
    assert message == BIDIRECTIONAL.format("LlamaModel")


@pytest.mark.parametrize("model_type", ["opt", "xglm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_leak_between_packed_rollouts_is_found(tmp_path: Path, model_type: str, dtype: Dtype) -> None:
    checkpoint = other_checkpoint(tmp_path, model_type)
    check(checkpoint, dtype=dtype)
    assert "so packed rollouts see each other" in refusal(check, checkpoint, dtype=dtype, packed=True)


def test_a_later_stage_that_needs_the_embeddings_is_refused(tmp_path: Path) -> None:
    zamba2 = other_checkpoint(tmp_path, "zamba2")
    check(zamba2)
    assert refusal(check, zamba2, 1, 5) == (
        "Zamba2Model: layers 1 to 4 look at the embeddings, which only the first stage has. Set cluster.stages to 1."
    )


def test_no_memory_for_the_check(llama: Checkpoint) -> None:
    def exhaust(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("fault injected by the test")

    model = load_slice(llama, first=0, stop=6, dtype="float32")
    with Stage(model, hooks=[LayerHook(layer=0, change=exhaust)]) as stage:
        assert refusal(check_stage, stage, packed=False) == (
            "LlamaModel: its blocks can't be run as those of a decoder: no memory for a micro-batch of 65 tokens"
        )


def test_the_check_uses_nothing_up(llama: Checkpoint) -> None:
    with Stage(load_slice(llama, first=0, stop=6, dtype="float32")) as stage:
        batch, _ = stage.probe((9, 4))
        before = stage.forward(batch).pooled()[0].sums_SD
        check_stage(stage, packed=True)
        assert (stage.forward(batch).pooled()[0].sums_SD == before).all()
