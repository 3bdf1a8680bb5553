"""Reading shards: just the inner chunks that are wanted, checked by their CRC-32C, with next to no cost per shard.

Zarr reads the same bytes (and everything here is tested against it), but takes some 1 to 4 ms of bookkeeping for each
shard, which for one layer of a large run is more than reading and decoding it.

Shape suffixes: R rows of a unit, D hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
from dask.base import tokenize
from numpy.typing import NDArray

from personaspace.store.errors import IntegrityError
from personaspace.store.layout import Layout, shard_key
from personaspace.store.objects import Folder
from personaspace.store.schema import ABSENT, BLOSC

NOT_COMMITTED = -1
"""Stands for the generation of a shard without a record."""
_CRC_BYTES = 4
_ENTRY_BYTES = 16
"""Of the shard's index: offset and length of an inner chunk, uint64 each."""


class CommittedShards:
    """Array-like view ``(rows, layers, hidden)`` of a stored array: committed shards, and NaN elsewhere.

    Index it with at most one list; Dask does. Picklable into any process, since it opens nothing before it is read.
    """

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(self, folder: Folder, path: str, layout: Layout, generations: NDArray[np.int_]) -> None:
        """``generations``: the committed one of each (unit, group), or NOT_COMMITTED."""
        self._folder = folder
        self._path = path
        self._layout = layout
        self._generations = generations
        self.shape = (layout.padded_rows, layout.layers, layout.hidden)

    def __dask_tokenize__(self) -> str:
        """Changes whenever more is committed or repaired, so that Dask never mixes two states of a run."""
        return str(tokenize(self._folder.url, self._path, self._layout, self._generations))

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[np.float32]:
        """Raises IntegrityError where a shard with a record is missing or damaged."""
        row_N, layer_L, hidden_D = (_places(part, size) for part, size in zip(index, self.shape, strict=True))
        rows, layers = np.atleast_1d(row_N), np.atleast_1d(layer_L)
        columns = index[2] if isinstance(index[2], slice) else np.atleast_1d(hidden_D)
        values = np.full((len(rows), len(layers), np.size(hidden_D)), np.nan, dtype=np.float32)
        unit_N = rows // self._layout.unit_rows
        for unit in np.unique(unit_N).tolist():
            place = _as_slice(np.flatnonzero(unit_N == unit))
            chunk_rows = _as_slice(rows[place] - unit * self._layout.unit_rows)
            for position, chunk_RD in self._read(unit, layers):
                values[place, position] = chunk_RD[chunk_rows][:, columns]
        return values.reshape(row_N.shape + layer_L.shape + hidden_D.shape)

    def _read(self, unit: int, layers: NDArray[np.int_]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(Place in ``layers``, its chunk) of everything committed, shard by shard."""
        group_L = layers // self._layout.layer_group
        for group in np.unique(group_L).tolist():
            if self._generations[unit, group] == NOT_COMMITTED:
                continue
            places = np.flatnonzero(group_L == group)
            first = self._layout.group_layers(group).start
            chunks = self._read_shard(unit, group, (layers[places] - first).tolist())
            yield from zip(places.tolist(), chunks, strict=True)

    def _read_shard(self, unit: int, group: int, chunks: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        key = shard_key(self._path, unit, group)
        group_size, shape = self._layout.layer_group, (self._layout.unit_rows, self._layout.hidden)
        index_bytes = group_size * _ENTRY_BYTES + _CRC_BYTES
        try:
            # Most of a shard is read whole, in one request.
            whole = self._folder.get(key) if 2 * len(chunks) > group_size else None
            tail = self._folder.get_tail(key, index_bytes) if whole is None else whole[-index_bytes:]
            entries = np.frombuffer(self._checked(tail, key, index_bytes), dtype="<u8").reshape(group_size, 2)
            for chunk in chunks:
                offset, length = entries[chunk].tolist()
                if offset == ABSENT:
                    raise IntegrityError(f"{self._folder.url}/{key}: has no chunk for layer {chunk} of its group.")
                data = self._folder.get_range(key, offset, length) if whole is None else whole[offset : offset + length]
                yield self._decode(self._checked(data, key, length), key, shape)
        except FileNotFoundError as error:
            raise IntegrityError(f"{self._folder.url}/{key}: is recorded, but missing.") from error

    def _checked(self, data: bytes, key: str, expected: int) -> bytes:
        """The bytes without the CRC-32C that ends them."""
        content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if len(data) != expected or google_crc32c.value(content) != int.from_bytes(crc, "little"):
            raise IntegrityError(
                f"{self._folder.url}/{key}: damaged: bytes differ from their CRC-32C. "
                "`personaspace store verify` shows all damage, `personaspace store repair` mends it."
            )
        return content

    def _decode(self, data: bytes, key: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        try:
            return np.frombuffer(BLOSC.decode(data), dtype="<f4").reshape(shape)
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(f"{self._folder.url}/{key}: a chunk does not decode: {error}") from error


def _places(part: Any, size: int) -> NDArray[np.int_]:
    """Places on an axis that part of an index means; 0-d for a single one."""
    if isinstance(part, slice):
        return np.arange(*part.indices(size))
    places = np.asarray(part)
    return np.flatnonzero(places) if places.dtype == bool else np.where(places < 0, places + size, places)


def _as_slice(places: NDArray[np.int_]) -> slice | NDArray[np.int_]:
    """A slice where the places follow each other, which NumPy copies faster than a list of them."""
    if len(places) and places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
