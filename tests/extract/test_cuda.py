"""On a GPU: the same sums as on the CPU, no host sync between the blocks, and copies that don't wait."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Attention
from personaspace.extract.pooling import HostCopy
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage

pytestmark = pytest.mark.gpu
LENGTHS = (40, 9, 31, 12, 23)


@pytest.fixture(autouse=True)
def _needs_cuda() -> Iterator[None]:
    assert torch.cuda.is_available(), "tests marked gpu need a CUDA device; leave them out with -m 'not gpu'"
    yield
    torch.cuda.set_sync_debug_mode("default")


def sums(checkpoint: Checkpoint, device: str, *, packed: bool, attention: Attention = "auto") -> dict[int, np.ndarray]:
    model = load_slice(checkpoint, first=0, stop=checkpoint.layers, dtype="float32", device=device, attention=attention)
    with Stage(model, sites=("resid_post", "mlp_out")) as stage:
        batch, _ = stage.probe(LENGTHS, packed=packed)
        return {row: pooled.sums_SD for row, pooled in stage.forward(batch).pooled().items()}


@pytest.mark.parametrize("packed", [False, True])
def test_the_gpu_gives_the_sums_of_the_cpu(llama: Checkpoint, packed: bool) -> None:
    expected = sums(llama, "cpu", packed=packed)
    found = sums(llama, "cuda", packed=packed)
    for row, sums_SD in expected.items():
        error = np.linalg.norm(found[row] - sums_SD) / np.linalg.norm(sums_SD)
        assert error <= 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_no_sync_between_the_blocks(llama: Checkpoint, packed: bool) -> None:
    model = load_slice(llama, first=0, stop=llama.layers, dtype="bfloat16", device="cuda")
    with Stage(model, sites=("resid_pre", "resid_post", "attn_out", "mlp_out")) as stage:
        check_stage(stage, packed=packed)
        batch, _ = stage.probe(LENGTHS, packed=packed)
        model.blocks[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"), prepend=True)
        model.blocks[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
        stage.forward(batch)


def test_copies_arrive_whole() -> None:
    tensors = [torch.randn(64, 1024, device="cuda") for _ in range(8)]
    copies = [HostCopy(tensor * 2) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        np.testing.assert_array_equal(copy.numpy(), (tensor * 2).cpu().numpy())
