"""The fit of a run: xarray Datasets in ``space/``, each written whole before ``space/latest.json`` names it.

Derived data: it can be made again from the store at any time.
"""

import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from personaspace.store.errors import InputError
from personaspace.store.location import Location, open_folder
from personaspace.store.objects import Folder
from personaspace.store.records import StoredObject, describe, read_object
from personaspace.store.sealed import seal, unseal

if TYPE_CHECKING:
    import xarray as xr

SPACE = "space"
LATEST = f"{SPACE}/latest.json"


def save_space(folder: Folder, space: "xr.Dataset") -> None:
    """Store the Dataset under a name of its own, then point to it: readers never see half."""
    before = _read_latest(folder)
    number = 1 if before is None else int(before["name"].split("-")[0]) + 1
    # The random part keeps two fits apart that run at the same time.
    name = f"{number:04d}-{uuid.uuid4().hex[:8]}.zarr"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        space.to_zarr(folder.zarr_store(f"{SPACE}/{name}", read_only=False), mode="w-", zarr_format=3)
    folder.sync(f"{SPACE}/{name}")
    objects = [describe(entry.key, folder.get(entry.key)) for entry in folder.list(f"{SPACE}/{name}")]
    folder.replace(LATEST, seal({"name": name, "objects": [asdict(stored) for stored in objects]}))
    if before is not None:
        for entry in list(folder.list(f"{SPACE}/{before['name']}")):
            folder.delete(entry.key)


def copy_space(source: Folder, target: Folder) -> None:
    """Copy the latest fit, if there is one."""
    for stored in space_objects(source) or ():
        target.replace(stored.key, read_object(source, stored))
    latest = _read_latest(source)
    if latest is not None:
        target.replace(LATEST, seal(latest))


def open_space(url: Location) -> "xr.Dataset":
    """The latest fit of the run at ``url``, lazy. Raises InputError if there is none."""
    folder = open_folder(url)
    latest = _read_latest(folder)
    if latest is None:
        raise InputError(f"{folder.url}: no persona space yet; run `fit` first.")
    import xarray as xr

    space = xr.open_zarr(folder.zarr_store(f"{SPACE}/{latest['name']}"))
    # Much of NumPy does not take the strings of any length that Zarr reads, and lazy ones would have no length.
    names = [name for name in space.coords if space[name].dtype.kind == "T"]
    texts = {name: (space[name].dims, space[name].values.astype(object).astype(str)) for name in names}
    opened: xr.Dataset = space.assign_coords(texts)
    return opened


def space_objects(folder: Folder) -> list[StoredObject] | None:
    """The objects of the latest fit, or None if there is none. Raises IntegrityError if the pointer is damaged."""
    latest = _read_latest(folder)
    return None if latest is None else [StoredObject(**stored) for stored in latest["objects"]]


def _read_latest(folder: Folder) -> Mapping[str, Any] | None:
    try:
        return unseal(folder.get(LATEST), f"{folder.url}/{LATEST}")
    except FileNotFoundError:
        return None
