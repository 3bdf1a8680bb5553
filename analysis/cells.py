"""Means per (role, question) cell: the one pass over the activations that role vectors and evidence rest on."""

from dataclasses import dataclass

import flox
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.schema import RESID_POST_MEAN, STATUS


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """Mean activation of each role's answers to each question, and how many rollouts each mean holds."""

    mean_RQLD: NDArray[np.float64]
    """Shape (roles, questions, layers, hidden); NaN where a cell has no rollout."""
    count_RQ: NDArray[np.int64]

    def role_means(self) -> NDArray[np.float64]:
        """Mean over a role's rollouts, each counting the same: ``(roles, layers, hidden)``."""
        weight_RQ = self.count_RQ / np.maximum(self.count_RQ.sum(1, keepdims=True), 1)
        means: NDArray[np.float64] = np.einsum("rq,rqld->rld", weight_RQ, np.nan_to_num(self.mean_RQLD), optimize=True)
        return means


def usable_rows(run: xr.Dataset) -> NDArray[np.intp]:
    """Rows with status ok. Raises InputError if there is none."""
    rows = np.flatnonzero(run["status"].values == STATUS.index("ok"))
    if not len(rows):
        raise InputError(f"{run.attrs['run']}: no extracted rollouts yet; run `extract` first.")
    return rows


def cell_means(run: xr.Dataset, roles: int, questions: int) -> Cells:
    """Average the run's usable rollouts by role and question, in float64, with Dask over the stored shards."""
    rows = usable_rows(run)
    status_ok = np.zeros(run.sizes["rollout"], dtype=bool)
    status_ok[rows] = True
    cell = np.where(status_ok, run["role_id"].values * questions + run["question"].values, -1)
    activations = run[RESID_POST_MEAN].transpose("layer", "hidden", "rollout").data.astype(np.float64)
    mean_LDC, _ = flox.groupby_reduce(
        activations, cell, func="mean", expected_groups=np.arange(roles * questions), fill_value=np.nan
    )
    mean_CLD = np.moveaxis(np.asarray(mean_LDC), 2, 0)
    return Cells(
        mean_RQLD=mean_CLD.reshape(roles, questions, *mean_CLD.shape[1:]),
        count_RQ=np.bincount(cell[rows], minlength=roles * questions).reshape(roles, questions),
    )
