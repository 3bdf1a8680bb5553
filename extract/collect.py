"""From micro-batches back to units: gathers what a window gave, checks it, and shapes it for shards.

Shape suffixes: Z sites, L layers of the stage, S segments of a rollout, D hidden, G layers of a group.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from personaspace.extract.packing import MicroBatch, token_hash
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import ArrayPlace
from personaspace.extract.stage import StageOutput
from personaspace.store.errors import IntegrityError

NON_FINITE = "non-finite activations"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What the stored rollout says that extraction must have seen."""

    token_hash: str
    counts: tuple[int, ...]
    """Tokens of each of its segments."""


class WindowBuffer:
    """What one window's micro-batches gave at one stage, until it is committed."""

    def __init__(self) -> None:
        self._arrived: list[StageOutput] = []
        self._hashes: dict[int, str] = {}
        self._pooled: dict[int, Pooled] = {}
        self._failed: dict[int, str] = {}
        self.split: set[int] = set()
        """Rows of micro-batches that ran in parts."""

    def add(
        self,
        batch: MicroBatch,
        output: StageOutput,
        *,
        split: bool = False,
        failed: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """Take in one micro-batch, without waiting for the device.

        ``split``: an earlier stage ran it in parts. ``failed``: row -> why an earlier stage could not run it. Raises
        IntegrityError for a row that is already there.
        """
        for row, ids in zip(batch.rows, batch.token_ids, strict=True):
            if row in self._hashes:
                raise IntegrityError(f"row {row} was extracted twice in one window")
            self._hashes[row] = token_hash(ids)
        if split or output.parts > 1:
            self.split |= set(batch.rows)
        self._failed |= {**output.failed, **failed}
        self._arrived.append(output)

    def means(self, expected: Mapping[int, Expected]) -> dict[int, NDArray[np.float32] | str]:
        """Row -> its means ``(Z, L, S, D)``, or why it has none. Waits for the device.

        Raises IntegrityError for a row that was never extracted, or from other tokens or spans than ``expected``.
        """
        while self._arrived:
            output = self._arrived.pop()
            self._pooled |= output.pooled()
        missing = [row for row in expected if row not in self._hashes]
        if missing:
            raise IntegrityError(f"rows {missing[:5]} of the unit were never extracted")
        means: dict[int, NDArray[np.float32] | str] = {}
        for row, stored in expected.items():
            if self._hashes[row] != stored.token_hash:
                raise IntegrityError(f"row {row} was extracted from other tokens than its rollout has")
            if row in self._failed:
                means[row] = self._failed[row]
                continue
            counts = tuple(self._pooled[row].counts_S.tolist())
            if counts != stored.counts:
                raise IntegrityError(f"row {row}: {counts} tokens were summed, and its spans have {stored.counts}")
            means[row] = self._pooled[row].means_SD
        return means


def shard_values(
    means: Mapping[int, NDArray[np.float32] | str],
    place: ArrayPlace,
    layers: slice,
    *,
    first_row: int,
    shape: tuple[int, int, int],
    capacity: int = 1,
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Values of one shard, ``(rows, G, D)``, and the rollouts that it drops, with reasons.

    ``layers`` counts from the first one that the stage reads. A rollout has ``capacity`` rows: one, or more in arrays
    of spans. Dropped, unused and padding rows are NaN.
    """
    values = np.full(shape, np.nan, dtype=np.float32)
    dropped: dict[int, str] = {}
    for row, means_ZLSD in means.items():
        if isinstance(means_ZLSD, str):
            dropped[row] = means_ZLSD
            continue
        means_SGD = means_ZLSD[place.site, layers, place.segments].swapaxes(0, 1)
        if np.isfinite(means_SGD).all():
            start = (row - first_row) * capacity
            values[start : start + len(means_SGD)] = means_SGD
        else:
            dropped[row] = NON_FINITE
    return values, dropped


def inspect_shard_values(
    values: NDArray[np.float32],
    *,
    first_row: int,
    known_dropped: Mapping[int, str],
    planned: Collection[int],
    used: Mapping[int, int] | None = None,
    capacity: int = 1,
) -> dict[int, str]:
    """Dropped rows of a found shard ``(rows, G, D)``. Raises IntegrityError if it can't be this unit's.

    ``used`` says how many of its ``capacity`` rows each rollout fills; None: its only one.
    """
    dropped = dict(known_dropped)
    for offset, places in enumerate(values.reshape(-1, capacity, *values.shape[1:])):
        row = first_row + offset
        count = 1 if used is None else used.get(row, 0)
        filled, unused = places[:count], places[count:]
        if not np.isnan(unused).all():
            raise IntegrityError(f"row {row} holds more spans than its rollout has")
        if row not in planned or row in known_dropped:
            if not np.isnan(filled).all():
                raise IntegrityError(f"row {row} holds values, but is not to be extracted")
        elif not np.isfinite(filled).all():
            if not np.isnan(filled).all():
                raise IntegrityError(f"row {row} is partly written")
            dropped[row] = NON_FINITE
    return dropped
