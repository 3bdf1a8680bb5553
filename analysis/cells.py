"""Means per (role, question) cell: the one pass over the activations that role vectors and evidence rest on.

Shape suffixes: R roles, Q questions, C cells (R x Q), D hidden, N rollouts.
"""

from dataclasses import dataclass

import dask.array as da
import flox
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.schema import STATUS


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """One layer's mean activation of each role's answers to each question."""

    mean_RQD: NDArray[np.float64]
    """NaN where a cell has no rollout."""
    count_RQ: NDArray[np.int64]
    """Rollouts in each mean."""

    def roles(self, chosen: list[int]) -> "Cells":
        """The cells of some roles."""
        return Cells(mean_RQD=self.mean_RQD[chosen], count_RQ=self.count_RQ[chosen])

    def questions(self, chosen: NDArray[np.intp]) -> "Cells":
        """The cells of some questions."""
        return Cells(mean_RQD=self.mean_RQD[:, chosen], count_RQ=self.count_RQ[:, chosen])

    def role_means(self) -> NDArray[np.float64]:
        """Mean over each role's rollouts, every rollout counting the same: ``(R, D)``."""
        weight_RQ = self.count_RQ / np.maximum(self.count_RQ.sum(1, keepdims=True), 1)
        mean_RD: NDArray[np.float64] = np.einsum("rq,rqd->rd", weight_RQ, np.nan_to_num(self.mean_RQD))
        return mean_RD


LEFT_OUT = "left_out"
"""Coordinate of rows that are not to be used although nothing is wrong with their activations."""


def usable_rows(run: xr.Dataset) -> NDArray[np.intp]:
    """Rows with status ok that are not left out. Raises InputError if there is none."""
    ok = run["status"].values == STATUS.index("ok")
    rows = np.flatnonzero(ok & ~run[LEFT_OUT].values if LEFT_OUT in run.coords else ok)
    if not ok.any():
        raise InputError(f"{run.attrs['run']}: no extracted rollouts yet; run `extract` first.")
    if not len(rows):
        raise InputError(
            f"analysis.leave_out: leaves none of the {ok.sum()} extracted rollouts; `personaspace quality "
            f"{run.attrs['run']}` shows which flaw they have."
        )
    return rows


def cell_of_row(run: xr.Dataset, questions: int) -> NDArray[np.intp]:
    """Cell of each row on the rollout axis, ``role_id * questions + question``; -1 for rows that are not usable."""
    cell_N = np.full(run.sizes["rollout"], -1, dtype=np.intp)
    rows = usable_rows(run)
    cell_N[rows] = run["role_id"].values[rows] * questions + run["question"].values[rows]
    return cell_N


def lazy_cell_sums(array: xr.DataArray, cell_N: NDArray[np.intp], cells: int) -> list[da.Array]:
    """For each layer of an array ``(rollout, layer, hidden)``, sums ``(D, C)`` float64 over the rows of each cell.

    Dask arrays over the stored shards.
    """
    x_NLD = array.data
    return [
        flox.groupby_reduce(
            x_NLD[:, layer, :].astype(np.float64).T,
            cell_N,
            func="sum",
            expected_groups=np.arange(cells),
            fill_value=0.0,
        )[0]
        for layer in range(x_NLD.shape[1])
    ]


def cells_from_sums(sum_DC: NDArray[np.float64], cell_N: NDArray[np.intp], roles: int, questions: int) -> Cells:
    """Cells of one layer from its sums."""
    count_C = np.bincount(cell_N[cell_N >= 0], minlength=roles * questions)
    with np.errstate(invalid="ignore"):
        mean_CD = np.where(count_C[:, None] > 0, sum_DC.T / np.maximum(count_C, 1)[:, None], np.nan)
    return Cells(
        mean_RQD=mean_CD.reshape(roles, questions, -1), count_RQ=count_C.reshape(roles, questions).astype(np.int64)
    )
