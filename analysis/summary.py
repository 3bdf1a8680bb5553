"""What one pass over a layer's activations leaves: moments of all rollouts, and sums of each (group, question) cell.

Summaries of disjoint rows merge into that of all of them, in any order, up to rounding. Shape suffixes: N rows, D
hidden, C cells.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.cells import Cells
from personaspace.analysis.pca.moments import Moments, Precision

BLOCK_ROWS = 2048
"""About as many rollouts are read, and multiplied, at a time."""


class Values(Protocol):
    """Array-like ``(rows, layers, hidden)`` float32, such as the store's CommittedShards."""

    shape: tuple[int, int, int]

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows to read, rising, and what each of them counts for."""

    row_N: NDArray[np.intp]
    """Places on the rollout axis."""
    cell_N: NDArray[np.intp]
    """The cell of each, or NO_CELL."""
    pooled_N: NDArray[np.bool_]
    """Whether it counts for the moments."""
    cells: int
    """C: cells there are."""
    unit_rows: int
    """Rows that are stored, and best read, together."""

    def blocks(self, most: int = BLOCK_ROWS) -> Iterator["Rows"]:
        """The rows in blocks of about ``most`` that cut no unit in two."""
        unit_N = self.row_N // self.unit_rows
        starts = np.flatnonzero(np.diff(unit_N, prepend=-1))
        ends = [*starts[1:].tolist(), len(unit_N)]
        begin = 0
        for end, after in zip(ends, [*ends[1:], None], strict=True):
            if after is None or after - begin > most:
                if end > begin:
                    yield self.part(slice(begin, end))
                begin = end

    def parts(self, count: int) -> list["Rows"]:
        """The rows in ``count`` parts of about the same size that cut no unit in two. There must be as many blocks."""
        blocks = list(self.blocks())
        cuts = [len(blocks) * number // count for number in range(count + 1)]
        edges = [0, *np.cumsum([len(block.row_N) for block in blocks]).tolist()]
        return [self.part(slice(edges[start], edges[stop])) for start, stop in itertools.pairwise(cuts)]

    def part(self, chosen: slice) -> "Rows":
        return Rows(
            row_N=self.row_N[chosen],
            cell_N=self.cell_N[chosen],
            pooled_N=self.pooled_N[chosen],
            cells=self.cells,
            unit_rows=self.unit_rows,
        )


@dataclass(kw_only=True, slots=True)
class Summary:
    """Moments and cells of one layer."""

    moments: Moments
    cells: Cells

    def merge(self, other: "Summary") -> "Summary":
        """Take in what another part of the rows gave. Returns itself."""
        self.moments.merge(other.moments)
        self.cells.merge(other.cells)
        return self

    def merged(self, other: "Summary") -> "Summary":
        """The same as a new Summary, for schedulers that may run a task again, with what it was given before."""
        cells = Cells(shift_D=self.cells.shift_D, sum_CD=self.cells.sum_CD.copy(), count_C=self.cells.count_C.copy())
        return Summary(moments=self.moments.copy(), cells=cells).merge(other)


def summarise(values: Values, layer: int, rows: Rows, precision: Precision = "float32") -> Summary:
    """Read some rows of a layer once, a block at a time, and sum them up.

    Raises ValueError where a row that counts holds a number that is not finite, IntegrityError for damaged shards.
    """
    hidden = values.shape[2]
    moments = Moments(hidden, precision)
    cells = None
    for block in rows.blocks():
        x_ND = values[block.row_N, layer, :]
        if cells is None:
            cells = Cells.empty(rows.cells, x_ND.mean(axis=0, dtype=np.float64).astype(np.float32))
        cells.add(x_ND, block.cell_N)
        moments.add(x_ND if block.pooled_N.all() else x_ND[block.pooled_N])
    return Summary(moments=moments, cells=cells or Cells.empty(rows.cells, np.zeros(hidden, dtype=np.float32)))


def summary_bytes(hidden: int, cells: int, precision: Precision = "float32") -> int:
    """Most memory that `summarise` takes for a layer: scatter matrix and product, cells, and the blocks being read."""
    product = {"float32": 4, "float64": 8}[precision]
    return (8 + product) * hidden**2 + 4 * cells * hidden + 6 * product * BLOCK_ROWS * hidden
