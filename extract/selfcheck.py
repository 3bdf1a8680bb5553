"""Before a stage is used: does it give each rollout what the rollout would get alone?

The proof is a run of the loaded slice itself, so it holds for families that nobody has tried before, too.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.packing import MicroBatch
from personaspace.extract.stage import Stage

_LENGTHS = (23, 4, 17, 9, 12)
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Median relative error over the rollouts: rounding moves bfloat16 by 5e-3, a wrong mask by 0.2 and more."""


def check_stage(stage: Stage, *, packed: bool) -> None:
    """Raise UnsupportedModelError if neighbours in a micro-batch change a rollout's states, or its width is another.

    ``packed`` says how micro-batches will be formed.
    """
    name = type(stage.model.decoder).__name__
    batch, received_BTD = stage.probe(_LENGTHS, packed=packed)
    try:
        together = stage.forward(batch, received_BTD).pooled()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if packed:
            raise UnsupportedModelError(f"{name}: can't run packed micro-batches: {error}. {_USE_PADDED}") from error
        raise UnsupportedModelError(f"{name}: its blocks can't be run as those of a decoder: {error}") from error
    errors_N = []
    for number, length in enumerate(_LENGTHS):
        row, origin = batch.origins[number]
        alone = MicroBatch(rows=(number,), token_ids=(batch.token_ids[number],), segments=(batch.segments[number],))
        own_BTD = None if received_BTD is None else received_BTD[row : row + 1, origin : origin + length]
        expected = stage.forward(alone, own_BTD).pooled()[number].sums_SD
        errors_N.append(_error(together[number].sums_SD, expected))
    if np.median(errors_N) <= _TOLERANCE[stage.model.dtype]:
        return
    found = f"a rollout's states differ by {np.median(errors_N):.1%} when others share its micro-batch"
    if packed:
        raise UnsupportedModelError(
            f"{name} with {stage.model.decoder.config._attn_implementation} attention: {found}, so packed rollouts "
            f"see each other. {_USE_PADDED}"
        )
    raise UnsupportedModelError(
        f"{name}: {found}. Its tokens see what follows them (bidirectional attention, for example); only causal "
        "decoders can be used."
    )


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative error where the rollout alone is finite: what overflows has a reason of its own to be dropped."""
    finite = np.isfinite(expected)
    return float(np.linalg.norm((found - expected)[finite]) / (np.linalg.norm(expected[finite]) or 1.0))


_USE_PADDED = "Set extract.packing to `padded`, or model.attention to `flash_attention_2`."
