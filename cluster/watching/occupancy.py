"""How much of a pipeline's time its stages stand idle, and why: arithmetic on what they say they did."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Interval = tuple[float, float]
"""Start and stop, seconds; of one stage they don't overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """Of one replica's stages, each between the start of its first and the end of its last forward pass."""

    idle: float
    """Share of that time in which a stage runs no forward pass; mean over the stages."""
    imbalance: float
    """The part of ``idle`` that remains however well work is handed over: a stage with less to do than the busiest
    one waits for it. Mean over the stages of (busy seconds of the busiest - own) / own time, at most its idle share."""
    bubble: float
    """The rest of ``idle``: waiting for micro-batches, hand-over, and the driver."""


def occupancy(stages: Sequence[Sequence[Interval]]) -> Occupancy:
    """From the forward passes of each stage of a replica. Raises ValueError if a stage has none."""
    if not stages or not all(stages):
        raise ValueError(
            f"no forward pass of stage {[bool(passes) for passes in stages].index(False) if stages else 0}"
        )
    spans = [max(stop for _, stop in passes) - min(start for start, _ in passes) for passes in stages]
    busy = [sum(stop - start for start, stop in passes) for passes in stages]
    idle = [max(0.0, 1 - worked / span) if span else 0.0 for worked, span in zip(busy, spans, strict=True)]
    less = [(max(busy) - worked) / span if span else 0.0 for worked, span in zip(busy, spans, strict=True)]
    imbalance = fmean(map(min, less, idle))
    return Occupancy(idle=fmean(idle), imbalance=imbalance, bubble=fmean(idle) - imbalance)
