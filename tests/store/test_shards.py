"""Our reader of shards gives what Zarr gives, reads no more than it needs, and refuses damage."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from personaspace.store.errors import IntegrityError
from personaspace.store.layout import Layout, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.objects import Folder
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec, encode_shard, group_objects
from personaspace.store.shards import NOT_COMMITTED, CommittedShards

LAYOUT = Layout(segments=(10, 5), layers=7, hidden=6, unit_rows=4, layer_group=3)


@dataclass(frozen=True, slots=True)
class CountingFolder(LocalFolder):
    """Notes the length of everything that is read."""

    def get(self, key: str) -> bytes:
        READ.append((key, len(data := LocalFolder.get(self, key))))
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        READ.append((key, length))
        return LocalFolder.get_range(self, key, start, length)

    def get_tail(self, key: str, length: int) -> bytes:
        READ.append((key, length))
        return LocalFolder.get_tail(self, key, length)


READ: list[tuple[str, int]] = []


def write(folder: Folder) -> NDArray[np.float32]:
    """All shards of an array; what they hold."""
    shape = (LAYOUT.padded_rows, LAYOUT.layers, LAYOUT.hidden)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values[3] = np.nan
    for key, data in group_objects(LAYOUT, [ArraySpec(name=RESID_POST_MEAN, description="")], {}).items():
        folder.put_new(key, data)
    for unit in range(LAYOUT.units):
        for group in range(LAYOUT.groups):
            layers = LAYOUT.group_layers(group)
            part = values[LAYOUT.unit_slice(unit), layers.start : layers.stop]
            folder.put_new(shard_key(RESID_POST_MEAN, unit, group), encode_shard(part, LAYOUT, "lossless"))
    return values


def view(folder: Folder, missing: list[tuple[int, int]] | None = None) -> CommittedShards:
    generations = np.zeros((LAYOUT.units, LAYOUT.groups), dtype=int)
    for unit, group in missing or []:
        generations[unit, group] = NOT_COMMITTED
    return CommittedShards(folder, RESID_POST_MEAN, LAYOUT, generations)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalFolder, NDArray[np.float32]]:
    folder = LocalFolder(tmp_path_factory.mktemp("shards"))
    return folder, write(folder)


def parts(size: int) -> st.SearchStrategy[Any]:
    """Whatever Dask may index an axis with, but lists."""
    return st.one_of(st.integers(0, size - 1), st.slices(size).filter(lambda part: (part.step or 1) > 0))


@settings(max_examples=200, deadline=None)
@given(rows=parts(20), layers=parts(7), hidden=parts(6))
def test_any_index_gives_what_numpy_gives(
    stored: tuple[LocalFolder, NDArray[np.float32]], rows: Any, layers: Any, hidden: Any
) -> None:
    folder, values = stored
    np.testing.assert_array_equal(view(folder)[rows, layers, hidden], values[rows, layers, hidden])


@settings(max_examples=100, deadline=None)
@given(
    picked=st.lists(st.integers(0, 19), max_size=12),
    missing=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), unique=True),
)
def test_lists_of_rows_and_missing_shards(
    stored: tuple[LocalFolder, NDArray[np.float32]], picked: list[int], missing: list[tuple[int, int]]
) -> None:
    folder, values = stored
    expected = values.copy()
    for unit, group in missing:
        layers = LAYOUT.group_layers(group)
        expected[LAYOUT.unit_slice(unit), layers.start : layers.stop] = np.nan
    index = (np.array(picked, dtype=int), slice(None), slice(None))
    np.testing.assert_array_equal(view(folder, missing)[index], expected[index])


def test_zarr_reads_the_same(stored: tuple[LocalFolder, NDArray[np.float32]]) -> None:
    folder, _ = stored
    array = zarr.open_array(folder.zarr_store("activations.zarr"), path=RESID_POST_MEAN, mode="r")
    np.testing.assert_array_equal(view(folder)[:, :, :], array[:, :, :])


def test_one_layer_reads_one_chunk_of_each_shard_and_its_index(tmp_path: Path) -> None:
    folder = CountingFolder(tmp_path)
    write(folder)
    READ.clear()
    view(folder)[0:8, 4, :]
    assert [key for key, _ in READ] == [shard_key(RESID_POST_MEAN, unit, 1) for unit in (0, 0, 1, 1)]
    whole = len(LocalFolder(tmp_path).get(shard_key(RESID_POST_MEAN, 0, 1)))
    index = 3 * 16 + 4
    assert READ[0][1] == index
    assert READ[1][1] < (whole - index) / 2


def test_on_every_storage_and_in_another_process(storage: Folder) -> None:
    values = write(storage)
    copied = pickle.loads(pickle.dumps(view(storage)))
    np.testing.assert_array_equal(copied[2:9, 1:5, :], values[2:9, 1:5, :])
    np.testing.assert_array_equal(copied[:, 6, :], values[:, 6, :])


@pytest.mark.parametrize("layers", [slice(3, 4), slice(3, 6)], ids=["one chunk", "the whole shard"])
def test_a_missing_shard_is_an_error(tmp_path: Path, layers: slice) -> None:
    folder = LocalFolder(tmp_path)
    write(folder)
    folder.delete(shard_key(RESID_POST_MEAN, 1, 1))
    with pytest.raises(IntegrityError, match="resid_post_mean/c/1/1/0: is recorded, but missing"):
        view(folder)[4:8, layers, :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data + b"x",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-10] + bytes([data[-10] ^ 1]) + data[-9:],
    ],
    ids=["empty", "cut", "longer", "index checksum", "index"],
)
def test_a_damaged_shard_is_an_error(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = LocalFolder(tmp_path)
    write(folder)
    key = shard_key(RESID_POST_MEAN, 1, 1)
    folder.replace(key, damage(folder.get(key)))
    for layers in (slice(3, 4), slice(3, 6)):
        with pytest.raises(IntegrityError, match=r"c/1/1/0: damaged: bytes differ from their CRC-32C\. .* repair"):
            view(folder)[4:8, layers, :]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_of_what_is_read_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = LocalFolder(tmp_path_factory.mktemp("flip"))
    write(folder)
    key = shard_key(RESID_POST_MEAN, 0, 0)
    content = bytearray(folder.get(key))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << (bit % 8)
    folder.replace(key, bytes(content))
    with pytest.raises(IntegrityError, match="damaged"):
        view(folder)[0:4, 0:3, :]
