"""Reading a run: a lazy xarray Dataset in which only committed data is visible."""

from itertools import product
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from dask.base import tokenize
from numpy.typing import NDArray
from zarr.storage import LocalStore

from personaspace.store.commit import COORDINATES_RECORD, committed_slots
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import ZARR_GROUP, Layout
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import LocalFolder
from personaspace.store.schema import COORDINATES, RESID_POST_MEAN

NOT_COMMITTED = -1
"""Stands for the generation of a shard without a record."""


def open_run(url: str | Path) -> xr.Dataset:
    """Open a run folder as a lazy Dataset with Dask chunks along its shards.

    Dims ``(rollout, layer, hidden)``; float32; rows and layers without a commit record read as NaN, and their
    ``status`` as 0 (pending), whatever lies in the store. Raises InputError if there is no run at ``url``.
    """
    path = Path(url).expanduser()
    folder = LocalFolder(path)
    manifest = require_manifest(folder)
    layout = manifest.layout
    committed = committed_slots(folder)
    group = zarr.open_group(LocalStore(path / ZARR_GROUP, read_only=True), mode="r")

    generations = np.full((layout.units, layout.groups), NOT_COMMITTED)
    rows_committed = np.zeros(layout.padded_rows, dtype=bool)
    for (array, unit, layer_group), generation in committed.items():
        if array == RESID_POST_MEAN:
            generations[unit, layer_group] = generation
        elif array == COORDINATES_RECORD:
            rows_committed[layout.unit_slice(unit)] = True

    lazy = CommittedArray(path / ZARR_GROUP / RESID_POST_MEAN, layout, generations)
    chunks = (layout.unit_rows, layout.layer_group, layout.hidden)
    activations = da.from_array(lazy, chunks=chunks, asarray=False, name=f"{RESID_POST_MEAN}-{lazy.token()}")
    coordinates: dict[str, Any] = {"layer": np.arange(layout.layers, dtype=np.int32)}
    for name in COORDINATES:
        stored: Any = zarr.open_array(group.store, path=name, mode="r")
        values = np.full(stored.shape, stored.fill_value, dtype=stored.dtype)
        # Reads the chunks of these rows only: what has no record may be damaged.
        values[rows_committed] = stored.oindex[np.flatnonzero(rows_committed)]
        coordinates[name] = ("rollout", values)
    return xr.Dataset(
        {RESID_POST_MEAN: (("rollout", "layer", "hidden"), activations)},
        coords=coordinates,
        attrs={"run": str(path), "identity_hash": manifest.identity_hash, "model": manifest.identity["model"]["name"]},
    )


class CommittedArray:
    """Array-like view of a stored array that reads committed shards and shows NaN elsewhere.

    ``generations`` is the committed generation of each (unit, group), or NOT_COMMITTED. The store is opened on
    use, so that Dask may pickle this into any process.
    """

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(self, path: Path, layout: Layout, generations: NDArray[np.int_]) -> None:
        self.path = path
        self.layout = layout
        self.generations = generations
        self.shape = (layout.padded_rows, layout.layers, layout.hidden)

    def token(self) -> str:
        """Changes whenever more is committed or repaired, so that Dask never mixes two states of a run."""
        return str(tokenize(str(self.path), self.layout, self.generations))

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[np.float32]:
        """Values at the index. Raises IntegrityError where a shard is recorded but missing."""
        units = np.arange(self.shape[0])[index[0]] // self.layout.unit_rows
        groups = np.arange(self.shape[1])[index[1]] // self.layout.layer_group
        visible = self.generations[np.ix_(np.atleast_1d(units), np.atleast_1d(groups))] != NOT_COMMITTED
        for unit, group in product(np.unique(units), np.unique(groups)):
            # Zarr would show a missing shard as its fill value, and that as rows without activations.
            shard = self.path / "c" / str(unit) / str(group) / "0"
            if self.generations[unit, group] != NOT_COMMITTED and not shard.exists():
                raise IntegrityError(f"{shard}: is recorded, but missing.")
        visible = visible.reshape(np.shape(units) + np.shape(groups))
        if not visible.any():
            hidden = np.arange(self.shape[2])[index[2]]
            return np.full(visible.shape + np.shape(hidden), np.nan, dtype=np.float32)
        array = zarr.open_array(LocalStore(self.path, read_only=True), mode="r")
        values = np.asarray(array[index], dtype=np.float32)
        if visible.all():
            return values
        missing = ~visible.reshape(visible.shape + (1,) * (values.ndim - visible.ndim))
        return np.where(missing, np.float32(np.nan), values)
