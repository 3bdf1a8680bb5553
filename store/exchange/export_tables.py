"""The numbers of a fit as tables, CSV and Parquet: what its report draws, for other programs."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import xarray as xr

ROWS = {"layers": ("layer",), "roles": ("role", "layer"), "traits": ("trait", "layer"), "variance": ("layer",)}
"""Table -> dims of its rows."""
SPREAD = ("resampled", "bound", "variance", "component")
"""Dims that become columns, such as `kind_auc_questions_low` or `role_score_pc1`."""
ONLY = {"variance": ("explained_variance_ratio", "rollout_explained_variance_ratio", "components_needed")}
"""Variables that have a table of their own."""


def fit_tables(space: xr.Dataset) -> dict[str, pa.Table]:
    """Name -> table: measures by layer, positions and scores by role and layer, traits, explained variance.

    Long vectors (over `hidden`) and single rollouts are left out; other formats hold those.
    """
    found = {}
    own = [name for names in ONLY.values() for name in names]
    for table, dims in ROWS.items():
        if not set(dims) <= set(space.dims):
            continue
        chosen = [
            name
            for name, variable in space.data_vars.items()
            if set(dims) <= set(variable.dims) <= {*dims, *SPREAD}
            and (name in ONLY[table] if table in ONLY else name not in own)
        ]
        index = np.meshgrid(*(space[dim].values for dim in dims), indexing="ij")
        columns = {dim: values.ravel() for dim, values in zip(dims, index, strict=True)}
        for name, coordinate in space.coords.items():
            if name not in dims and coordinate.dims == dims[:1]:
                columns[str(name)] = np.repeat(coordinate.values, len(columns[dims[0]]) // coordinate.size)
        for name in chosen:
            columns |= _spread(str(name), space[name].transpose(*dims, ...), len(dims))
        found[table] = pa.table({name: _plain(values) for name, values in columns.items()})
    return found


def _spread(name: str, variable: xr.DataArray, rows: int) -> dict[str, np.ndarray]:
    """A column for each combination of the dims that don't make rows."""
    dims: Sequence[str] = [str(dim) for dim in variable.dims[rows:]]
    columns = {}
    for place in np.ndindex(variable.shape[rows:]):
        parts = [_label(variable, dim, at) for dim, at in zip(dims, place, strict=True)]
        columns["_".join([name, *parts])] = variable.values[(..., *place)].ravel()
    return columns


def _label(variable: xr.DataArray, dim: str, at: int) -> str:
    if dim == "component":
        return f"pc{at + 1}"
    value = variable[dim].values[at]
    return f"{value:.0%}".rstrip("%") if dim == "variance" else str(value)


def _plain(values: np.ndarray) -> np.ndarray:
    return values.astype(object) if values.dtype.kind in "UT" else values
