"""Sums per (group, question) cell: what role vectors, and all resampling of roles and questions, are made from.

A group is a role at one level of its score, `default`, or a pole of a trait. Shape suffixes: N rows of a block, C
cells, V vectors, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

NO_CELL = -1
"""Cell of a row that belongs to no group."""
STRIP = 1024
"""Dimensions that are summed at a time."""


@dataclass(kw_only=True, slots=True)
class Cells:
    """One layer's sums of each cell's rollouts, about a fixed point, so that float32 keeps their digits."""

    shift_D: NDArray[np.float32]
    """The fixed point: near the mean, subtracted from every rollout before it is added."""
    sum_CD: NDArray[np.float32]
    """Sums of ``x - shift``."""
    count_C: NDArray[np.int64]
    """Rollouts in each sum."""

    @classmethod
    def empty(cls, cells: int, shift_D: NDArray[np.float32]) -> "Cells":
        return cls(
            shift_D=shift_D,
            sum_CD=np.zeros((cells, len(shift_D)), dtype=np.float32),
            count_C=np.zeros(cells, dtype=np.int64),
        )

    def add(self, x_ND: NDArray[np.float32], cell_N: NDArray[np.intp]) -> None:
        """Add a block of rollouts. Rows of ``NO_CELL`` are passed over."""
        rows = np.flatnonzero(cell_N != NO_CELL)
        found, place = np.unique(cell_N[rows], return_inverse=True)
        dealing = csr_array((np.ones(len(rows), dtype=np.float32), (place, rows)), shape=(len(found), len(cell_N)))
        self.sum_CD[found] += dealing @ (x_ND - self.shift_D)
        self.count_C[found] += np.bincount(place, minlength=len(found))

    def merge(self, other: "Cells") -> None:
        """Add what another part of the rows gave; its fixed point may be another."""
        moved_D = other.shift_D.astype(np.float64) - self.shift_D
        # In strips, since what is added is as large as the sums, and twice as wide.
        for start in range(0, len(moved_D), STRIP):
            strip = slice(start, start + STRIP)
            self.sum_CD[:, strip] += other.sum_CD[:, strip] + np.outer(other.count_C, moved_D[strip])
        self.count_C += other.count_C

    def vectors(self, weight_VC: csr_array) -> tuple[NDArray[np.floating], NDArray[np.float64]]:
        """Weighted means ``(V, D)`` about the fixed point, and the rollouts in each ``(V,)``; NaN where there is none.

        A weight of 2 counts each rollout of a cell twice. Sums run in the weights' dtype: float32, or float64.
        """
        count_V = weight_VC @ self.count_C.astype(np.float64)
        vector_VD = np.empty((len(count_V), len(self.shift_D)), dtype=weight_VC.dtype)
        # In strips, since scipy makes a copy of what it multiplies in the wider of the two dtypes.
        for start in range(0, len(self.shift_D), STRIP):
            vector_VD[:, start : start + STRIP] = weight_VC @ self.sum_CD[:, start : start + STRIP]
        with np.errstate(invalid="ignore", divide="ignore"):
            vector_VD /= count_V[:, None].astype(vector_VD.dtype)
        return vector_VD, count_V


def selection(cells: Sequence[NDArray[np.intp]], total: int, dtype: type[np.floating] = np.float64) -> csr_array:
    """Weights ``(V, total)``: vector v is the mean over the rollouts of ``cells[v]``.

    A cell named twice counts twice.
    """
    indptr = np.concatenate([[0], np.cumsum([len(chosen) for chosen in cells])])
    indices = np.concatenate([*cells, np.empty(0, dtype=np.intp)])
    return csr_array((np.ones(len(indices), dtype=dtype), indices, indptr), shape=(len(cells), total))
