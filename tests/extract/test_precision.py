"""What `model.dtype: auto` stands for on a machine."""

import platform
from pathlib import Path

import pytest
import torch

from personaspace.extract.config import ModelConfig
from personaspace.extract.precision import cpu_computes_bfloat16, machine_dtype


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_it_is_what_the_kernel_says_of_the_cpu() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert cpu_computes_bfloat16() == ("amx_tile" in flags or "avx512_bf16" in flags)


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (True, False), (False, True), (None, None)])
def test_either_feature_makes_it_bfloat16(
    monkeypatch: pytest.MonkeyPatch, amx: bool | None, avx512: bool | None
) -> None:
    """None: a torch that does not know."""
    for name, found in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
        monkeypatch.delattr(torch.cpu, name)
        if found is not None:
            monkeypatch.setattr(torch.cpu, name, lambda found=found: found, raising=False)
    assert machine_dtype("cpu") == ("bfloat16" if amx or avx512 else "float32")
    assert machine_dtype("cuda:0") == "bfloat16"


def test_auto_has_to_be_settled() -> None:
    assert ModelConfig(id="m", dtype="float16").settled_dtype == "float16"
    with pytest.raises(
        ValueError, match=r"^model\.dtype: auto is not settled; use cluster\.precision\.settle_dtype, or"
    ):
        _ = ModelConfig(id="m").settled_dtype
