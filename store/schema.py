"""The Zarr group of a run: its arrays, and the bytes of single shards and chunks encoded in memory.

Zarr itself writes metadata and coordinates to a MemoryStore, and the resulting objects are published by the commit
protocol; shards are encoded to the same bytes directly. So any Zarr v3 reader can decode what is stored.
"""

import warnings
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from personaspace.store.config import Precision
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import ZARR_GROUP, Layout
from personaspace.store.records import Slot

BLOSC = numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE)
ABSENT = 2**64 - 1
"""Offset and length of an inner chunk that does not exist, in a shard's index."""
RESID_POST_MEAN = "resid_post_mean"
SPANS = "spans"
"""Subgroup of arrays with a row for each span (turn, think or answer part) in place of each rollout."""
STATUS = ("pending", "ok", "dropped", "pad")
"""Meaning of the values of the `status` coordinate."""
PARTS = ("unused", "whole", "think", "answer")
"""Meaning of the values of the `part` coordinate of spans."""

COORDINATES: Mapping[str, tuple[str, str]] = {
    "role": ("string", "Permanent id of the role"),
    "role_id": ("int32", "Index into the roles of run.json"),
    "prompt": ("int32", "Index of the role's system prompt"),
    "question": ("int32", "Index into the questions of run.json"),
    "sample": ("int32", "Repetition of the same prompt and question"),
    "n_tokens": ("int32", "Response tokens that were averaged"),
    "status": ("uint8", "0 pending, 1 ok, 2 dropped, 3 pad"),
}
SPAN_COORDINATES: Mapping[str, tuple[str, str]] = {
    "rollout": ("int32", "Row of the rollout that the span belongs to"),
    "turn": ("int32", "Assistant turn of the rollout, 0-based"),
    "part": ("uint8", "0 unused place, 1 whole turn, 2 think, 3 answer"),
    "count": ("int32", "Tokens that were averaged"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """One array of activations: what is read where in the model, and how it is reduced over tokens."""

    name: str
    """Site and reduction, such as `resid_post_mean`."""
    description: str
    layers: tuple[int, ...] | None = None
    """Layers that are asked for; None for all. The layer axis has full length whatever this says."""
    spans: tuple[str, ...] = ()
    """Parts of assistant turns that get a row each, in place of each rollout; the array lies in the group `spans`."""

    @property
    def path(self) -> str:
        """Path of the array in the Zarr group."""
        return f"{SPANS}/{self.name}" if self.spans else self.name

    @property
    def record(self) -> str:
        """Name of the array in records, which know no slashes."""
        return self.path.replace("/", ".")

    def wanted_groups(self, layout: Layout) -> range | list[int]:
        """Layer groups that hold the layers asked for."""
        if self.layers is None:
            return range(layout.groups)
        return sorted({layer // layout.layer_group for layer in self.layers})

    def wanted_layers(self, layout: Layout) -> list[int]:
        """Layers of those groups: a shard is written whole."""
        return [layer for group in self.wanted_groups(layout) for layer in layout.group_layers(group)]

    def complete_layers(self, layout: Layout, committed: Container[Slot], units: Collection[int]) -> list[int]:
        """Wanted layers that all of some units have; none if there are no units."""
        return [
            layer
            for group in self.wanted_groups(layout)
            if units and all((self.record, unit, group) in committed for unit in units)
            for layer in layout.group_layers(group)
        ]


def span_parts(arrays: Iterable[ArraySpec]) -> tuple[str, ...]:
    """Parts of assistant turns that get a row each; all arrays of spans of a run have the same ones."""
    return next((spec.spans for spec in arrays if spec.spans), ())


def group_objects(
    layout: Layout, arrays: Sequence[ArraySpec], attributes: Mapping[str, Any], spans_per_rollout: int = 0
) -> dict[str, bytes]:
    """Key -> bytes of the group without any data: all ``zarr.json``, and the coordinate `layer`."""
    objects: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(objects), attributes=dict(attributes))
    _create_arrays(group, layout, "rollout", [spec for spec in arrays if not spec.spans], COORDINATES)
    if spans_per_rollout:
        spans = group.create_group(SPANS)
        ragged = [spec for spec in arrays if spec.spans]
        _create_arrays(spans, layout.of_spans(spans_per_rollout), "span", ragged, SPAN_COORDINATES)
    with warnings.catch_warnings():
        # Zarr notes that v3 has no consolidated metadata yet; xarray warns at every open where it is missing.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(group.store)
    return {f"{ZARR_GROUP}/{key}": bytes(value.to_bytes()) for key, value in sorted(objects.items())}


def _create_arrays(
    group: zarr.Group,
    layout: Layout,
    row_dimension: str,
    arrays: Sequence[ArraySpec],
    coordinates: Mapping[str, tuple[str, str]],
) -> None:
    for spec in arrays:
        group.create_array(
            spec.name,
            shape=(layout.padded_rows, layout.layers, layout.hidden),
            **_activation_spec(layout),
            dimension_names=(row_dimension, "layer", "hidden"),
            attributes={"description": spec.description, "coordinates": " ".join(coordinates)},
        )
    for name, (dtype, description) in coordinates.items():
        group.create_array(
            name,
            shape=(layout.padded_rows,),
            **_coordinate_spec(layout, dtype),
            dimension_names=(row_dimension,),
            attributes={"description": description},
        )
    layers = group.create_array(
        "layer",
        shape=(layout.layers,),
        dtype="int32",
        dimension_names=("layer",),
        attributes={"description": "Residual stream after this block, 0-based, before any final norm"},
    )
    layers[:] = np.arange(layout.layers, dtype=np.int32)


def encode_shard(values_RGD: NDArray[np.float32], layout: Layout, precision: Precision) -> bytes:
    """Bytes of one shard of an activation array. Shape ``(R, layers of the group, hidden)``, NaN where missing.

    The very bytes that Zarr writes for this array's codecs (a test holds it to that), at half of the time, and in
    several threads at once, where Zarr's calls wait for one event loop.
    """
    rounded_GRD = round_mantissa(values_RGD, precision).transpose(1, 0, 2)
    index = np.full((layout.layer_group, 2), ABSENT, dtype="<u8")
    parts, offset = [], 0
    for place, chunk_RD in enumerate(rounded_GRD):
        data = with_crc32c(BLOSC.encode(np.ascontiguousarray(chunk_RD, dtype="<f4")))
        index[place] = offset, len(data)
        parts.append(data)
        offset += len(data)
    return b"".join([*parts, with_crc32c(index.tobytes())])


def with_crc32c(data: bytes) -> bytes:
    """The bytes, ended by their CRC-32C."""
    crc: int = google_crc32c.value(data)
    return data + crc.to_bytes(4, "little")


def decode_shard(data: bytes, layout: Layout, layers: int) -> NDArray[np.float32]:
    """Values ``(R, layers, hidden)`` of one shard's bytes. Raises IntegrityError if they don't decode."""
    shape = (layout.unit_rows, layers, layout.hidden)
    return np.asarray(_decode(data, shape=shape, key="c/0/0/0", spec=_activation_spec(layout)), dtype=np.float32)


def encode_coordinate(values: NDArray[Any], layout: Layout, name: str, *, spans: bool = False) -> bytes:
    """Bytes of one unit's chunk of the coordinate ``name``. Shape ``(R,)``."""
    dtype = (SPAN_COORDINATES if spans else COORDINATES)[name][0]
    return _encode(values, shape=(layout.unit_rows,), key="c/0", spec=_coordinate_spec(layout, dtype))


def decode_coordinate(data: bytes, layout: Layout, name: str, *, spans: bool = False) -> NDArray[Any]:
    """Values ``(R,)`` of one coordinate chunk. Raises IntegrityError if it doesn't decode."""
    dtype = (SPAN_COORDINATES if spans else COORDINATES)[name][0]
    return _decode(data, shape=(layout.unit_rows,), key="c/0", spec=_coordinate_spec(layout, dtype))


def round_mantissa(values: NDArray[np.float32], precision: Precision) -> NDArray[np.float32]:
    """Round float32 values to the stored number of mantissa bits; NaN and infinities stay as they are.

    Rounding happens here and not as a recorded codec, since TensorStore refuses arrays with one.
    """
    if precision == "lossless":
        return values
    codec = numcodecs.BitRound(keepbits=int(precision))
    rounded: NDArray[np.float32] = codec.decode(codec.encode(values.astype(np.float32, copy=True))).reshape(
        values.shape
    )
    if np.isfinite(values).all() and np.isfinite(rounded).all():
        return rounded
    # BitRound turns some NaN payloads, and the largest finite values, into infinities.
    return np.where(np.isfinite(values) & np.isfinite(rounded), rounded, values)


def _activation_spec(layout: Layout) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "chunks": (layout.unit_rows, 1, layout.hidden),
        "shards": (layout.unit_rows, layout.layer_group, layout.hidden),
        "fill_value": float("nan"),
        "compressors": [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=4), Crc32cCodec()],
        # Without this an all-NaN shard would not exist, and its record would point to nothing.
        "config": {"write_empty_chunks": True},
    }


def _coordinate_spec(layout: Layout, dtype: str) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "chunks": (layout.unit_rows,),
        "fill_value": "" if dtype == "string" else 0,
        "compressors": [Crc32cCodec()],
        "config": {"write_empty_chunks": True},
    }


def _encode(values: NDArray[Any], *, shape: tuple[int, ...], key: str, spec: dict[str, Any]) -> bytes:
    objects: dict[str, Any] = {}
    array = zarr.create_array(MemoryStore(objects), shape=shape, **spec)
    array[...] = values
    return bytes(objects[key].to_bytes())


def _decode(data: bytes, *, shape: tuple[int, ...], key: str, spec: dict[str, Any]) -> NDArray[Any]:
    if not data:
        raise IntegrityError(f"0 bytes do not decode as a chunk of shape {shape}: the object is empty.")
    objects: dict[str, Any] = {key: default_buffer_prototype().buffer.from_bytes(data)}
    array = zarr.create_array(MemoryStore(objects), shape=shape, **spec)
    try:
        return np.asarray(array[...])
    except Exception as error:  # Codecs raise errors of many kinds; all of them mean bytes that can't be trusted.
        raise IntegrityError(f"{len(data)} bytes do not decode as a chunk of shape {shape}: {error}") from error
