"""What `model.dtype: auto` stands for on a machine: bfloat16 where it computes in it, else float32."""

import torch

from personaspace.extract.config import Dtype

_FEATURES = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""Of torch.cpu; torch has no public names for them."""


def cpu_computes_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16.

    On others bfloat16 costs several times as much as float32. Arm's, Apple's among them, count as such: torch's float32
    is the better tuned there.
    """
    return any(getattr(torch.cpu, name, bool)() for name in _FEATURES)


def machine_dtype(device: str) -> Dtype:
    """What `auto` stands for on ``device`` (`cpu`, `cuda:0`) of this machine."""
    return "bfloat16" if torch.device(device).type != "cpu" or cpu_computes_bfloat16() else "float32"
