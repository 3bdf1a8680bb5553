"""The bytes of shards and chunks: what goes in comes out, within the kept bits, or not at all."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from personaspace.store.config import Precision
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import ZARR_GROUP, Layout, coordinate_key, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.schema import (
    COORDINATES,
    RESID_POST_MEAN,
    SPAN_COORDINATES,
    SPANS,
    STATUS,
    ArraySpec,
    decode_coordinate,
    decode_shard,
    encode_coordinate,
    encode_shard,
    group_objects,
    round_mantissa,
)

LAYOUT = Layout(segments=(10,), layers=5, hidden=6, unit_rows=4, layer_group=3)
PRECISIONS = get_args(Precision)
BELOW_OVERFLOW = 3.38e38
SMALLEST_NORMAL = 2.0**-126
SHARDS = hnp.arrays(np.float32, (4, 3, 6), elements=st.floats(width=32))
MEAN = ArraySpec(name=RESID_POST_MEAN, description="Means")
TURNS = ArraySpec(name="resid_post_turn", description="Means of turns", spans=("whole",))


def write_group(path: Path, layout: Layout = LAYOUT, arrays: tuple[ArraySpec, ...] = (MEAN,), spans: int = 0) -> None:
    """The group of a new run, as its creation publishes it."""
    for key, data in group_objects(layout, arrays, {"identity_hash": "ab"}, spans).items():
        LocalFolder(path).replace(key, data)


def some_values(seed: int = 0, layers: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((4, layers, 6)).astype(np.float32)


def assert_within_kept_bits(got: NDArray[Any], values: NDArray[np.float32], precision: Precision) -> None:
    """Half of the last kept bit; below the smallest normal number bits are worth what they are worth there."""
    if precision == "lossless":
        np.testing.assert_array_equal(got.view(np.uint32), values.view(np.uint32))
        return
    finite = np.isfinite(values)
    np.testing.assert_array_equal(got[~finite].view(np.uint32), values[~finite].view(np.uint32))
    assert np.isfinite(got[finite]).all()
    size = np.maximum(np.abs(values[finite].astype(np.float64)), SMALLEST_NORMAL)
    assert np.all(np.abs(got[finite] - values[finite].astype(np.float64)) <= size * 2.0 ** -(int(precision) + 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@given(values=SHARDS.filter(lambda values: not np.any(np.abs(values[np.isfinite(values)]) > BELOW_OVERFLOW)))
@settings(max_examples=40, deadline=None)
def test_round_trip_within_the_kept_bits(precision: Precision, values: NDArray[np.float32]) -> None:
    assert_within_kept_bits(decode_shard(encode_shard(values, LAYOUT, precision), LAYOUT, 3), values, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_largest_values_stay_finite(precision: Precision) -> None:
    largest = np.array([1, -1], dtype=np.float32) * np.finfo(np.float32).max
    assert np.isfinite(round_mantissa(largest, precision)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_missing_rows_are_kept(precision: Precision) -> None:
    values = some_values()
    values[1], values[2, 0, :2], values[3] = np.nan, [np.inf, -np.inf], np.nan
    values[3].view(np.uint32)[...] = 0x7FFFFFFF  # A payload that rounding would carry into another number.
    assert_within_kept_bits(decode_shard(encode_shard(values, LAYOUT, precision), LAYOUT, 3), values, precision)


def test_all_missing_shard_is_stored(tmp_path: Path) -> None:
    data = encode_shard(np.full((4, 3, 6), np.nan, dtype=np.float32), LAYOUT, "16")
    assert len(data) > 0
    assert np.isnan(decode_shard(data, LAYOUT, 3)).all()


def test_rounding_does_not_touch_its_input() -> None:
    values = some_values()
    before = values.copy()
    encode_shard(values, LAYOUT, "10")
    np.testing.assert_array_equal(values, before)


def test_last_smaller_group_reads_back_from_the_whole_array(tmp_path: Path) -> None:
    write_group(tmp_path)
    first, last = some_values(1), some_values(2, layers=2)
    folder = LocalFolder(tmp_path)
    folder.put_new(shard_key(RESID_POST_MEAN, 1, 0), encode_shard(first, LAYOUT, "lossless"))
    folder.put_new(shard_key(RESID_POST_MEAN, 1, 1), encode_shard(last, LAYOUT, "lossless"))
    stored = zarr.open_group(tmp_path / ZARR_GROUP, mode="r")[RESID_POST_MEAN][...]
    np.testing.assert_array_equal(stored[4:8], np.concatenate([first, last], axis=1))
    assert np.isnan(stored[:4]).all()
    assert np.isnan(stored[8:]).all()
    np.testing.assert_array_equal(decode_shard(encode_shard(last, LAYOUT, "lossless"), LAYOUT, 2), last)


GOOD = some_values()
GOOD_BYTES = encode_shard(GOOD, LAYOUT, "lossless")


@given(bit=st.integers(0, len(GOOD_BYTES) * 8 - 1))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_never_gives_other_values(bit: int) -> None:
    damaged = bytearray(GOOD_BYTES)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        decoded = decode_shard(bytes(damaged), LAYOUT, 3)
    except IntegrityError:
        return
    np.testing.assert_array_equal(decoded, GOOD)


@given(length=st.integers(1, len(GOOD_BYTES) - 1))
@settings(max_examples=50, deadline=None)
def test_a_cut_shard_is_refused(length: int) -> None:
    with pytest.raises(IntegrityError, match=rf"^{length} bytes do not decode as a chunk of shape"):
        decode_shard(GOOD_BYTES[:length], LAYOUT, 3)


def test_an_empty_shard_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"^0 bytes do not decode"):
        decode_shard(b"", LAYOUT, 3)


@pytest.mark.parametrize("other", [{"hidden": 8}, {"unit_rows": 5}, {"layer_group": 4}])
def test_a_shard_of_another_layout_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(IntegrityError, match="do not decode as a chunk of shape"):
        decode_shard(GOOD_BYTES, replace(LAYOUT, **other), 3)


def coordinate_values(name: str) -> NDArray[Any]:
    if name == "role":
        return np.array(["poet", "", "hacker", "ωmega"], dtype=object)
    return np.arange(4, dtype=COORDINATES[name][0])


@pytest.mark.parametrize("spans", [False, True])
def test_coordinate_chunks_round_trip(spans: bool) -> None:
    for name, (dtype, _) in (SPAN_COORDINATES if spans else COORDINATES).items():
        if dtype == "string":
            values = np.array(["poet", "", "hacker", "ωmega"], dtype=object)
        else:
            values = np.array([0, 1, 3, np.iinfo(dtype).max], dtype=dtype)
        data = encode_coordinate(values, LAYOUT, name, spans=spans)
        assert decode_coordinate(data, LAYOUT, name, spans=spans).tolist() == values.tolist()
        with pytest.raises(IntegrityError, match="do not decode as a chunk of shape"):
            decode_coordinate(data[:-1], LAYOUT, name, spans=spans)


def test_a_flipped_bit_of_a_coordinate_is_found() -> None:
    data = encode_coordinate(np.arange(4, dtype=np.int32), LAYOUT, "question")
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError, match=rf"^{len(data)} bytes do not decode as a chunk of shape \(4,\): "):
            decode_coordinate(bytes(damaged), LAYOUT, "question")


@pytest.mark.parametrize("name", COORDINATES)
def test_coordinates_read_back(tmp_path: Path, name: str) -> None:
    write_group(tmp_path)
    values = coordinate_values(name)
    LocalFolder(tmp_path).put_new(coordinate_key(name, 1), encode_coordinate(values, LAYOUT, name))
    stored = zarr.open_group(tmp_path / ZARR_GROUP, mode="r")[name][...]
    assert list(stored[4:8]) == list(values)
    assert all(not value for value in [*stored[:4], *stored[8:]])


def test_xarray_opens_the_group_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_group(tmp_path)
        dataset = xr.open_zarr(tmp_path / ZARR_GROUP)
    assert dataset.attrs == {"identity_hash": "ab"}
    assert list(dataset.data_vars) == [RESID_POST_MEAN]
    assert dataset[RESID_POST_MEAN].dims == ("rollout", "layer", "hidden")
    assert dataset[RESID_POST_MEAN].shape == (12, 5, 6)
    assert set(dataset.coords) == {*COORDINATES, "layer"}
    assert dataset["layer"].values.tolist() == [0, 1, 2, 3, 4]
    assert np.isnan(dataset[RESID_POST_MEAN].values).all()
    assert (dataset["status"] == STATUS.index("pending")).all()


def test_spans_are_a_group_of_their_own(tmp_path: Path) -> None:
    layout = replace(LAYOUT, segments=(10, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_group(tmp_path, layout, (MEAN, TURNS), spans=3)
        rollouts = xr.open_zarr(tmp_path / ZARR_GROUP)
        spans = xr.open_zarr(tmp_path / ZARR_GROUP, group=SPANS, consolidated=False)
    assert list(rollouts.data_vars) == [RESID_POST_MEAN]
    assert list(spans.data_vars) == ["resid_post_turn"]
    assert rollouts["resid_post_mean"].sizes == {"rollout": 16, "layer": 5, "hidden": 6}
    assert spans["resid_post_turn"].sizes == {"span": 48, "layer": 5, "hidden": 6}
    assert set(spans.coords) == {*SPAN_COORDINATES, "layer"}
    assert np.isnan(spans["resid_post_turn"].values).all()
    assert not spans["part"].values.any()
    metadata = json.loads((tmp_path / ZARR_GROUP / SPANS / "resid_post_turn" / "zarr.json").read_text())
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [12, 3, 6]


def test_the_same_shape_gives_the_same_metadata() -> None:
    """A resume after a crash publishes it again, and the record of run.json must hold."""
    assert group_objects(LAYOUT, (MEAN, TURNS), {"a": 1}, 2) == group_objects(LAYOUT, (MEAN, TURNS), {"a": 1}, 2)


def test_growth_changes_nothing_but_metadata() -> None:
    before, after = (group_objects(layout, (MEAN, TURNS), {}, 2) for layout in (LAYOUT, LAYOUT.grow(5)))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert before.keys() == after.keys()
    assert all(key.endswith("/zarr.json") for key in changed)
    assert max(after) == f"{ZARR_GROUP}/zarr.json"  # What readers open is published last, in the order of keys.


def test_array_specs() -> None:
    assert (MEAN.path, MEAN.record) == ("resid_post_mean", "resid_post_mean")
    assert (TURNS.path, TURNS.record) == ("spans/resid_post_turn", "spans.resid_post_turn")
    assert list(MEAN.wanted_groups(LAYOUT)) == [0, 1]
    assert list(replace(MEAN, layers=(3, 4)).wanted_groups(LAYOUT)) == [1]
    assert list(replace(MEAN, layers=(4, 0)).wanted_groups(LAYOUT)) == [0, 1]


def codecs_of(metadata: dict[str, Any]) -> set[str]:
    """Names of all codecs, those inside a shard too."""
    names = set()
    for codec in metadata["codecs"]:
        inner = codec.get("configuration", {})
        names |= {codec["name"], *codecs_of({"codecs": inner.get("codecs", []) + inner.get("index_codecs", [])})}
    return names


@pytest.mark.parametrize("name", [RESID_POST_MEAN, *COORDINATES])
def test_stored_metadata_is_plain_zarr(tmp_path: Path, name: str) -> None:
    write_group(tmp_path)
    metadata = json.loads((tmp_path / ZARR_GROUP / name / "zarr.json").read_text())
    kind = {RESID_POST_MEAN: {"sharding_indexed", "bytes", "blosc", "crc32c"}, "role": {"vlen-utf8", "crc32c"}}
    assert codecs_of(metadata) == kind.get(name, {"bytes", "crc32c"})
    assert metadata["storage_transformers"] == []
    assert metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    if name == RESID_POST_MEAN:
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [4, 3, 6]
        assert metadata["codecs"][0]["configuration"]["chunk_shape"] == [4, 1, 6]
        assert metadata["fill_value"] == "NaN"
        assert metadata["attributes"]["coordinates"].split() == list(COORDINATES)


@pytest.mark.parametrize("precision", PRECISIONS)
@given(values=SHARDS)
@settings(max_examples=40, deadline=None)
def test_shards_are_the_bytes_that_zarr_writes(precision: Precision, values: NDArray[np.float32]) -> None:
    objects: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(metadata_of(LAYOUT)), path=ZARR_GROUP)
    array = zarr.create_array(
        MemoryStore(objects),
        shape=values.shape,
        chunks=(LAYOUT.unit_rows, 1, LAYOUT.hidden),
        shards=(LAYOUT.unit_rows, LAYOUT.layer_group, LAYOUT.hidden),
        dtype="float32",
        fill_value=float("nan"),
        compressors=group[RESID_POST_MEAN].compressors,  # type: ignore[union-attr]
        config={"write_empty_chunks": True},
    )
    array[...] = round_mantissa(values, precision)
    assert encode_shard(values, LAYOUT, precision) == objects["c/0/0/0"].to_bytes()


def metadata_of(layout: Layout) -> dict[str, Any]:
    """Of a group with the default array, as Zarr's MemoryStore takes it."""
    make = default_buffer_prototype().buffer.from_bytes
    objects = group_objects(layout, [ArraySpec(name=RESID_POST_MEAN, description="")], {})
    return {key: make(data) for key, data in objects.items()}
