"""Reading shards: just the inner chunks that are wanted, checked by their CRC-32C, with next to no cost per shard.

Zarr reads the same bytes (and everything here is tested against it), but takes some 1 to 4 ms of bookkeeping for each
shard, which for one layer of a large run is more than reading and decoding it.

Shape suffixes: R rows of a unit, D hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
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
        self.layout = layout
        self._generations = generations
        self.shape = (layout.padded_rows, layout.layers, layout.hidden)

    def __dask_tokenize__(self) -> str:
        """Changes whenever more is committed or repaired, so that Dask never mixes two states of a run."""
        from dask.base import tokenize

        return str(tokenize(self._folder.url, self._path, self.layout, self._generations))

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[np.float32]:
        """Raises IntegrityError where a shard with a record is missing or damaged."""
        row_N, layer_L, hidden_D = (_places(part, size) for part, size in zip(index, self.shape, strict=True))
        rows, layers = np.atleast_1d(row_N), np.atleast_1d(layer_L)
        columns = index[2] if isinstance(index[2], slice) else np.atleast_1d(hidden_D)
        values = np.empty((len(rows), len(layers), np.size(hidden_D)), dtype=np.float32)
        chunk_RD = np.empty((self.layout.unit_rows, self.layout.hidden), dtype=np.float32)
        whole = slice(0, self.layout.unit_rows)
        whole_columns = isinstance(index[2], slice) and index[2].indices(self.shape[2]) == (0, self.shape[2], 1)
        unit_N, group_L = rows // self.layout.unit_rows, layers // self.layout.layer_group
        for unit in np.unique(unit_N).tolist():
            place = _as_slice(np.flatnonzero(unit_N == unit))
            chunk_rows = _as_slice(rows[place] - unit * self.layout.unit_rows)
            # A whole unit of one layer is decoded right to where it belongs.
            in_place = len(layers) == 1 and whole_columns and isinstance(place, slice) and _is_all(chunk_rows, whole)
            for group in np.unique(group_L).tolist():
                positions = np.flatnonzero(group_L == group).tolist()
                if self._generations[unit, group] == NOT_COMMITTED:
                    values[place, positions[0] : positions[-1] + 1] = np.nan
                    continue
                first = self.layout.group_layers(group).start
                wanted = [int(layers[position]) - first for position in positions]
                for position, data in zip(positions, self._read_chunks(unit, group, wanted), strict=True):
                    target = values[place, position]
                    if in_place:
                        self._decode(data, unit, group, target)
                    else:
                        self._decode(data, unit, group, chunk_RD)
                        values[place, position] = chunk_RD[chunk_rows][:, columns]
        return values.reshape(row_N.shape + layer_L.shape + hidden_D.shape)

    def _read_chunks(self, unit: int, group: int, chunks: Sequence[int]) -> Iterator[bytes]:
        """Encoded inner chunks of one shard, by their places in it."""
        key = shard_key(self._path, unit, group)
        group_size = self.layout.layer_group
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
                yield self._checked(data, key, length)
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

    def _decode(self, data: bytes, unit: int, group: int, target_RD: NDArray[np.float32]) -> None:
        try:
            BLOSC.decode(data, out=target_RD)
        except (RuntimeError, ValueError) as error:
            key = shard_key(self._path, unit, group)
            raise IntegrityError(f"{self._folder.url}/{key}: a chunk does not decode: {error}") from error


class SelectedShards:
    """Array-like view of some rows and layers of ``CommittedShards``, for which only what is wanted is read."""

    dtype = np.dtype(np.float32)
    ndim = 3

    def __init__(self, shards: CommittedShards, row_N: NDArray[np.int_], layer_L: NDArray[np.int_]) -> None:
        self._shards, self._row_N, self._layer_L = shards, row_N, layer_L
        self.shape = (len(row_N), len(layer_L), shards.shape[2])

    def __dask_tokenize__(self) -> str:
        from dask.base import tokenize

        return str(tokenize(self._shards, self._row_N, self._layer_L))

    def __getitem__(self, index: tuple[Any, ...]) -> NDArray[np.float32]:
        return self._shards[self._row_N[index[0]], self._layer_L[index[1]], index[2]]

    def chunks(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Lengths of chunks of about ``size`` bytes that cut no shard in two, if the rows are in order."""
        layout = self._shards.layout
        layers = _run_lengths(self._layer_L // layout.layer_group)
        most = max(1, size // (4 * max(layers, default=1) * self.shape[2]))
        rows: list[int] = []
        for length in _run_lengths(self._row_N // layout.unit_rows):
            if rows and rows[-1] + length <= most:
                rows[-1] += length
            else:
                rows.append(length)
        return tuple(rows) or (0,), tuple(layers) or (0,), (self.shape[2],)


def _is_all(rows: slice | NDArray[np.int_], whole: slice) -> bool:
    return isinstance(rows, slice) and rows == whole


def _run_lengths(values: NDArray[np.int_]) -> list[int]:
    """How often each value follows itself."""
    borders = np.flatnonzero(np.diff(values)) + 1
    lengths: list[int] = np.diff([0, *borders.tolist(), len(values)]).tolist()
    return lengths if len(values) else []


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
