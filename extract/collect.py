"""From micro-batches back to units: gathers a window's span means, checks them, and shapes them for shards."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from personaspace.store.errors import IntegrityError

NON_FINITE = "non-finite activations"


class WindowBuffer:
    """Span means of one window at one stage, ``(rows, layers of the stage, hidden)``, until they are committed."""

    def __init__(self, layers: int, hidden: int) -> None:
        self._hidden = hidden
        self._layers = range(layers)
        self._means_LD: dict[int, NDArray[np.float32]] = {}

    def add(self, rows: Sequence[int], means_BLD: NDArray[np.float32]) -> None:
        """Take in one micro-batch. Raises IntegrityError for a row that is already there."""
        for row, means_LD in zip(rows, means_BLD, strict=True):
            if row in self._means_LD:
                raise IntegrityError(f"row {row} was extracted twice in one window")
            self._means_LD[row] = means_LD

    def unit_values(
        self, unit_rows: slice, known_dropped: Mapping[int, str], planned: Collection[int], layers: slice
    ) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Values ``(R, layers, hidden)`` of a unit's shard and its dropped rows with reasons.

        ``layers`` counts from the stage's first. Dropped and padding rows are NaN. Raises IntegrityError when a
        planned row is missing.
        """
        missing = [row for row in planned if row not in known_dropped and row not in self._means_LD]
        if missing:
            raise IntegrityError(f"rows {missing[:5]} of the unit were never extracted")
        shape = (unit_rows.stop - unit_rows.start, len(self._layers[layers]), self._hidden)
        values = np.full(shape, np.nan, dtype=np.float32)
        dropped = dict(known_dropped)
        for row in planned:
            if row in known_dropped:
                continue
            means_LD = self._means_LD[row][layers]
            if np.isfinite(means_LD).all():
                values[row - unit_rows.start] = means_LD
            else:
                dropped[row] = NON_FINITE
        return values, dropped


def inspect_unit(
    values: NDArray[np.float32], first_row: int, known_dropped: Mapping[int, str], planned: Collection[int]
) -> dict[int, str]:
    """Dropped rows of a found shard ``(R, layers, hidden)``. Raises IntegrityError if it can't be this unit's."""
    dropped = dict(known_dropped)
    for offset, row_values in enumerate(values):
        row = first_row + offset
        if np.isfinite(row_values).all():
            if row not in planned or row in known_dropped:
                raise IntegrityError(f"row {row} holds values, but is not to be extracted")
        elif not np.isnan(row_values).all():
            raise IntegrityError(f"row {row} is partly written")
        elif row in planned and row not in known_dropped:
            dropped[row] = NON_FINITE
    return dropped
