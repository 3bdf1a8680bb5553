"""An index of the rollout axis: two columns in one file, in place of thousands of chunks, so that opening is instant.

It is derived data. It names the state of the run that it was made from, and is left aside where that is another.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray

from personaspace.store.committed import CommittedStore, digest
from personaspace.store.errors import IntegrityError
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest
from personaspace.store.objects import Folder
from personaspace.store.parquet import decode_table, encode_table
from personaspace.store.records import COORDINATES_RECORD, Slot, StoredObject, committed_slots, describe, read_object
from personaspace.store.sealed import seal, unseal

INDEX = "index.json"
TABLE = "index.parquet"
COLUMNS = ("n_tokens", "status")
"""The coordinates that the plan does not know."""


def write_index(fence: Fence, manifest: Manifest) -> None:
    """Write the index of what is committed now, unless it is up to date."""
    committed = committed_slots(fence.folder)
    state = _state(manifest, committed)
    if is_current(fence.folder, manifest, committed):
        return
    columns = _from_chunks(fence.folder, manifest, committed)
    data = encode_table(pa.table({name: columns[name] for name in COLUMNS}))
    fence.check()
    fence.folder.replace(TABLE, data)
    stored = describe(TABLE, data)
    fence.folder.replace(INDEX, seal({"state": state, "bytes": stored.bytes, "table_sha256": stored.sha256}))


def read_index(folder: Folder, manifest: Manifest, committed: Mapping[Slot, int]) -> dict[str, NDArray[np.integer]]:
    """`n_tokens` and `status` of every row: from the index if it is of this state, else from the chunks."""
    stored = _read_head(folder, _state(manifest, committed))
    if stored is not None:
        try:
            table = decode_table(read_object(folder, stored))
            return {name: table[name].to_numpy() for name in COLUMNS}
        except IntegrityError:
            pass  # Replaced this moment, or damaged, which `verify` reports; the chunks say the same.
    return _from_chunks(folder, manifest, committed)


def is_current(folder: Folder, manifest: Manifest, committed: Mapping[Slot, int]) -> bool:
    """Whether there is an intact index of what is committed."""
    return _read_head(folder, _state(manifest, committed)) is not None and is_whole(folder)


def is_whole(folder: Folder) -> bool:
    """Whether the index is intact, of whatever state of the run it is."""
    try:
        return bool(read_object(folder, _stored(unseal(folder.get(INDEX), INDEX))))
    except (FileNotFoundError, IntegrityError):
        return False


def _state(manifest: Manifest, committed: Mapping[Slot, int]) -> str:
    """Of what an index is made: the length of the rollout axis, and the committed coordinates."""
    coordinates = {slot: number for slot, number in committed.items() if slot[0] == COORDINATES_RECORD}
    return f"{manifest.layout.padded_rows} rows, {digest(coordinates)}"


def _read_head(folder: Folder, state: str) -> StoredObject | None:
    try:
        head = unseal(folder.get(INDEX), INDEX)
    except (FileNotFoundError, IntegrityError):
        return None
    if head["state"] != state:
        return None
    return _stored(head)


def _stored(head: Mapping[str, Any]) -> StoredObject:
    return StoredObject(key=TABLE, bytes=head["bytes"], sha256=head["table_sha256"])


def _from_chunks(folder: Folder, manifest: Manifest, committed: Mapping[Slot, int]) -> dict[str, NDArray[np.integer]]:
    store = CommittedStore(folder, committed)
    rows = manifest.layout.padded_rows
    return {
        name: np.asarray(zarr.open_array(store, path=name, mode="r")[:rows])  # The array may have grown since.
        for name in COLUMNS
    }
