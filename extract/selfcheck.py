"""Before a stage is used: does it give each rollout what the rollout would get alone?

The proof is a run of the loaded slice itself, so it holds for families that nobody has tried before, too.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.packing import MicroBatch
from personaspace.extract.stage import Stage

_LENGTHS = (23, 4, 17, 9, 12)
_ALONE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Median relative error against runs alone, whose kernels round otherwise: by 5e-3 in bfloat16, by more where a router
changes its mind."""
_INFLUENCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.01}
"""Relative change of a rollout when only others change, in tensors of the same shapes: none at all, but where experts
take tokens in groups."""
_USE_PADDED = "Set extract.packing to `padded`, or model.attention to `flash_attention_2`."


def check_stage(stage: Stage, *, packed: bool) -> None:
    """Raise UnsupportedModelError if a rollout's states depend on anything but the rollout.

    That is: on its neighbours in a micro-batch, on padding, or, in a later stage, on embeddings that it does not
    have. ``packed`` says how micro-batches will be formed.
    """
    name, dtype = type(stage.model.decoder).__name__, stage.model.dtype
    try:
        influence = _influence(stage, packed=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        if stage.model.compiled:
            raise UnsupportedModelError(
                f"{name}: torch.compile can't make its blocks run: {error}\nLeave extract.compile out; it takes a C++ "
                "compiler on CPUs, and Triton on GPUs."
            ) from error
        raise UnsupportedModelError(f"{name}: its blocks can't be run as those of a decoder: {error}") from error
    if influence > _INFLUENCE[dtype]:
        raise UnsupportedModelError(
            f"{name}: a rollout's states differ by {influence:.1%} when only what follows it changes (bidirectional "
            "attention, for example); only causal decoders can be used."
        )
    alone = _from_alone(stage, packed=False)
    if alone > _ALONE[dtype]:
        raise UnsupportedModelError(f"{name}: a rollout's states differ by {alone:.1%} from those of a run alone.")
    if stage.model.first > 0 and _looks_at_embeddings(stage):
        raise UnsupportedModelError(
            f"{name}: layers {stage.model.first} to {stage.stop - 1} look at the embeddings, which only the first "
            "stage has. Set cluster.stages to 1."
        )
    if packed:
        _check_packed(stage, name, influence)


def _check_packed(stage: Stage, name: str, noise: float) -> None:
    """``noise``: how far others change a rollout in padded micro-batches, where they can't be seen."""
    try:
        influence = _influence(stage, packed=True)
        alone = _from_alone(stage, packed=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UnsupportedModelError(f"{name}: can't run packed micro-batches: {error}. {_USE_PADDED}") from error
    if influence > max(4 * noise, 1e-5) or alone > _ALONE[stage.model.dtype]:
        raise UnsupportedModelError(
            f"{name} with {stage.model.decoder.config._attn_implementation} attention: a rollout's states differ by "
            f"{max(influence, alone):.1%} when others share its micro-batch, so packed rollouts see each other. "
            f"{_USE_PADDED}"
        )


def _influence(stage: Stage, *, packed: bool) -> float:
    """The largest relative change of a rollout's states when only other rollouts, and what pads it, change.

    The tensors' shapes stay the same, so that no kernel rounds otherwise.
    """
    batch, received_BTD = stage.probe(_LENGTHS, packed=packed)
    before = _sums(stage, batch, received_BTD)
    lengths = _LENGTHS if packed else (max(_LENGTHS),) * len(_LENGTHS)
    others, others_BTD = stage.probe(lengths, packed=packed, seed=1)
    changes = []
    for number, ids in enumerate(batch.token_ids):
        own = (*ids, *others.token_ids[number][len(ids) :])
        token_ids = (*others.token_ids[:number], own, *others.token_ids[number + 1 :])
        changed = replace(others, token_ids=token_ids, segments=batch.segments)
        states_BTD = None
        if received_BTD is not None and others_BTD is not None:
            states_BTD = others_BTD.clone()
            row, origin = batch.origins[number]
            place = (row, slice(origin, origin + len(ids)))
            states_BTD[place] = received_BTD[place]
        changes.append(_error(_sums(stage, changed, states_BTD)[number], before[number]))
    return max(changes)


def _from_alone(stage: Stage, *, packed: bool) -> float:
    """Median relative difference of rollouts in company from the same ones alone."""
    batch, received_BTD = stage.probe(_LENGTHS, packed=packed)
    together = _sums(stage, batch, received_BTD)
    errors = []
    for number, length in enumerate(_LENGTHS):
        row, origin = batch.origins[number]
        alone = replace(batch.part(number, number + 1), packed=False)
        own_BTD = None if received_BTD is None else received_BTD[row : row + 1, origin : origin + length]
        errors.append(_error(together[number], _sums(stage, alone, own_BTD)[number]))
    return float(np.median(errors))


def _looks_at_embeddings(stage: Stage) -> bool:
    batch, received_BTD = stage.probe(_LENGTHS)
    _, embedded_BTD = stage.probe(_LENGTHS, seed=1)
    usual = _sums(stage, batch, received_BTD)
    other = _sums(stage, batch, received_BTD, embedded_BTD)
    return any(_error(other[row], usual[row]) > _INFLUENCE[stage.model.dtype] for row in usual)


def _sums(
    stage: Stage,
    batch: MicroBatch,
    received_BTD: torch.Tensor | None,
    embedded_BTD: torch.Tensor | None = None,
) -> dict[int, NDArray[np.float32]]:
    output = stage.forward(batch, received_BTD, embedded_BTD=embedded_BTD)
    if output.failed:
        raise RuntimeError(f"no memory for a micro-batch of {batch.tokens} tokens")
    return {row: pooled.sums_SD for row, pooled in output.pooled().items()}


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative error where the rollout alone is finite: what overflows has a reason of its own to be dropped."""
    finite = np.isfinite(expected)
    return float(np.linalg.norm((found - expected)[finite]) / (np.linalg.norm(expected[finite]) or 1.0))
