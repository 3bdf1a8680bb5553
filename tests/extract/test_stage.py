"""A slice of a model gives what one plain forward pass per rollout gives, for every architecture and every cut."""

import random
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, ModelConfig
from personaspace.extract.packing import MicroBatch
from personaspace.extract.stage import Stage, load_slice
from tests.models import FAMILIES, SLIDING_WINDOW, tiny_checkpoint

LAYERS = 6
CUTS = [(0, 6), (0, 2, 6), (0, 1, 5, 6)]
LENGTHS = (40, 9, 31, 12, 23)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, layers=LAYERS)
    return resolve(ModelConfig(id=str(folder)))


@pytest.fixture(scope="module")
def batch() -> MicroBatch:
    draw = random.Random(0)
    assert max(LENGTHS) > 2 * SLIDING_WINDOW
    return MicroBatch(
        rows=tuple(range(len(LENGTHS))),
        token_ids=tuple(tuple(draw.randrange(3, 400) for _ in range(length)) for length in LENGTHS),
        spans=tuple((draw.randrange(1, length // 2), length - draw.randrange(3)) for length in LENGTHS),
    )


def run(checkpoint: Checkpoint, cut: tuple[int, ...], batch: MicroBatch, dtype: Dtype) -> NDArray[np.float32]:
    """Span means ``(B, all layers, D)`` of a chain of stages."""
    received_BTD, means = None, []
    for first, stop in pairwise(cut):
        output = Stage(checkpoint, first=first, stop=stop, dtype=dtype).forward(batch, received_BTD)
        received_BTD = output.hidden_BTD
        means.append(output.means_BLD)
    assert received_BTD is None
    return np.concatenate(means, axis=1)


def plain_means(checkpoint: Checkpoint, batch: MicroBatch) -> NDArray[np.float64]:
    """The truth: the unmodified model, one rollout at a time, hooks on its blocks, the mean in float64."""
    model = AutoModel.from_pretrained(checkpoint.source, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for block in model.h if hasattr(model, "h") else model.layers:
        block.register_forward_hook(lambda _, __, output: seen.append(output[0] if type(output) is tuple else output))
    means = []
    for ids, (start, stop) in zip(batch.token_ids, batch.spans, strict=True):
        seen.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]))
        means.append(np.stack([h_1TD[0, start:stop].double().numpy().mean(0) for h_1TD in seen]))
    return np.stack(means)


def test_means_equal_a_plain_forward_pass(checkpoint: Checkpoint, batch: MicroBatch) -> None:
    expected_BLD = plain_means(checkpoint, batch)
    assert expected_BLD.shape == (len(LENGTHS), LAYERS, checkpoint.hidden)
    single_BLD = run(checkpoint, (0, LAYERS), batch, "float32")
    error_BL = np.linalg.norm(single_BLD - expected_BLD, axis=2) / np.linalg.norm(expected_BLD, axis=2)
    assert error_BL.max() <= 1e-5


@pytest.mark.parametrize("cut", CUTS)
def test_stages_are_bit_identical_to_one(checkpoint: Checkpoint, batch: MicroBatch, cut: tuple[int, ...]) -> None:
    single_BLD = run(checkpoint, (0, LAYERS), batch, "float32")
    np.testing.assert_array_equal(run(checkpoint, cut, batch, "float32"), single_BLD)


def test_stages_are_bit_identical_to_one_in_bfloat16(llama: Checkpoint, batch: MicroBatch) -> None:
    single_BLD = run(llama, (0, LAYERS), batch, "bfloat16")
    assert single_BLD.dtype == np.float32
    np.testing.assert_array_equal(run(llama, (0, 1, 5, 6), batch, "bfloat16"), single_BLD)


def test_a_stage_holds_its_own_blocks_only(checkpoint: Checkpoint) -> None:
    whole = AutoModel.from_pretrained(checkpoint.source)
    token_embedding = whole.get_input_embeddings().weight
    for first, stop in [(0, 2), (2, 5), (5, 6)]:
        expected = {}
        for name, parameter in whole.named_parameters():
            block = re.match(r"(?:layers|h)\.(\d+)\.", name)
            if first <= int(block[1]) < stop if block else first == 0 or parameter is not token_embedding:
                expected[name] = parameter.numel()
        held = dict(load_slice(checkpoint, first=first, stop=stop, dtype="float32", device=CPU).named_parameters())
        assert {name: parameter.numel() for name, parameter in held.items()} == expected
        assert not [name for name, parameter in held.items() if parameter.is_meta]
        assert not [name for name in held if "lm_head" in name or "embed_out" in name]


def test_a_second_batch_is_not_disturbed_by_the_first(llama: Checkpoint, batch: MicroBatch) -> None:
    stage = Stage(llama, first=0, stop=3, dtype="float32")
    first = stage.forward(batch)
    short = MicroBatch(rows=(7,), token_ids=((5, 6, 7),), spans=((1, 3),))
    assert stage.forward(short).means_BLD.shape == (1, 3, llama.hidden)
    again = stage.forward(batch)
    np.testing.assert_array_equal(again.means_BLD, first.means_BLD)
    assert first.hidden_BTD is not None
    assert again.hidden_BTD is not None
    assert torch.equal(again.hidden_BTD, first.hidden_BTD)


def damaged(checkpoint: Checkpoint, folder: Path, *, without: str) -> Checkpoint:
    shutil.copytree(checkpoint.source, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[without]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve(ModelConfig(id=str(folder)))


def test_missing_weight_is_refused_by_the_stage_that_needs_it(llama: Checkpoint, tmp_path: Path) -> None:
    broken = damaged(llama, tmp_path / "broken", without="model.layers.3.mlp.down_proj.weight")
    with pytest.raises(UnsupportedModelError) as error:
        Stage(broken, first=2, stop=6, dtype="float32")
    assert str(error.value).startswith(
        f"{broken.source}: 1 weights of layers 2 to 5 are not in the checkpoint (layers.3.mlp.down_proj.weight"
    )
    Stage(broken, first=0, stop=3, dtype="float32")


def test_missing_expert_is_refused(tmp_path: Path) -> None:
    whole = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path / "mixtral", "mixtral", layers=2))))
    Stage(whole, first=0, stop=2, dtype="float32")
    broken = damaged(whole, tmp_path / "broken", without="model.layers.1.block_sparse_moe.experts.2.w1.weight")
    with pytest.raises(UnsupportedModelError):
        Stage(broken, first=0, stop=2, dtype="float32")
