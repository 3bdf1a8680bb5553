"""``open_run`` shows what is committed, all of it, and nothing else."""

import pickle
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personaspace.store import open_run
from personaspace.store.commit import COORDINATES_RECORD, commit
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.layout import ZARR_GROUP, Layout, coordinate_key, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest, write_session
from personaspace.store.reader import NOT_COMMITTED, CommittedArray
from personaspace.store.schema import (
    COORDINATES,
    RESID_POST_MEAN,
    STATUS,
    create_group,
    encode_coordinate,
    encode_shard,
)

LAYOUT = Layout(segments=(10,), layers=5, hidden=3, unit_rows=4, layer_group=3)
ALL = [(unit, group) for unit in range(LAYOUT.units) for group in range(LAYOUT.groups)]
VALUES = np.random.default_rng(0).standard_normal((12, 5, 3)).astype(np.float32)
VALUES[10:] = np.nan  # Padding of the last unit.
ROLES = ["poet"] * 4 + ["hacker"] * 6 + [""] * 2
OK, PAD = STATUS.index("ok"), STATUS.index("pad")


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    """A new run without any committed data."""
    folder = LocalFolder(tmp_path / "run")
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        create_group(folder.path, LAYOUT, {RESID_POST_MEAN: ""}, {})
        manifest = Manifest(identity={"model": {"name": "tiny"}}, layout=LAYOUT, tables={}, plan={}, execution={})
        write_session(folder, manifest, manifest, {"epoch": 1})
        yield lease.fence


def shard(unit: int, group: int) -> tuple[str, bytes]:
    layers = LAYOUT.group_layers(group)
    values = VALUES[LAYOUT.unit_slice(unit), layers.start : layers.stop]
    return shard_key(RESID_POST_MEAN, unit, group), encode_shard(values, LAYOUT, "lossless")


def coordinates(unit: int) -> dict[str, bytes]:
    columns: dict[str, Any] = {name: np.arange(12, dtype=np.int32) for name in COORDINATES}
    columns |= {"role": np.array(ROLES, dtype=object), "status": np.array([OK] * 10 + [PAD] * 2, dtype=np.uint8)}
    rows = LAYOUT.unit_slice(unit)
    return {coordinate_key(name, unit): encode_coordinate(columns[name][rows], LAYOUT, name) for name in COORDINATES}


def commit_shards(fence: Fence, shards: Iterable[tuple[int, int]]) -> None:
    for unit, group in shards:
        rows = LAYOUT.unit_row_range(unit)
        commit(fence, (RESID_POST_MEAN, unit, group), dict([shard(unit, group)]), rows=rows, dropped={})


def commit_coordinates(fence: Fence, units: Iterable[int]) -> None:
    for unit in units:
        rows = LAYOUT.unit_row_range(unit)
        commit(fence, (COORDINATES_RECORD, unit, 0), coordinates(unit), rows=rows, dropped={})


def assert_visible(dataset: xr.Dataset, shards: Iterable[tuple[int, int]]) -> None:
    expected = np.full_like(VALUES, np.nan)
    for unit, group in shards:
        layers = LAYOUT.group_layers(group)
        place = LAYOUT.unit_slice(unit), slice(layers.start, layers.stop)
        expected[place] = VALUES[place]
    np.testing.assert_array_equal(dataset[RESID_POST_MEAN].values, expected)


def test_new_run_is_all_pending(fence: Fence) -> None:
    dataset = open_run(fence.folder.path)
    assert dataset.sizes == {"rollout": 12, "layer": 5, "hidden": 3}
    assert dataset[RESID_POST_MEAN].dtype == np.float32
    assert set(dataset.coords) == {*COORDINATES, "layer"}
    assert (dataset["status"] == 0).all()
    assert (dataset["role"] == "").all()
    assert_visible(dataset, [])


def test_complete_run_shows_everything(fence: Fence) -> None:
    commit_shards(fence, ALL)
    commit_coordinates(fence, range(3))
    dataset = open_run(str(fence.folder.path))
    assert_visible(dataset, ALL)
    assert dataset["role"].values.tolist() == ROLES
    assert dataset["status"].values.tolist() == [OK] * 10 + [PAD] * 2
    assert dataset["question"].values.tolist() == list(range(12))
    assert dataset["layer"].values.tolist() == [0, 1, 2, 3, 4]
    assert dataset[RESID_POST_MEAN].chunks == ((4, 4, 4), (3, 2), (3,))
    assert dataset.attrs["run"] == str(fence.folder.path)
    assert dataset.attrs["model"] == "tiny"


def test_objects_without_record_are_not_seen(fence: Fence) -> None:
    commit_shards(fence, [(0, 0)])
    commit_coordinates(fence, [0])
    for unit, group in ALL:
        fence.folder.put_new(*shard(unit, group))
    for key, data in coordinates(1).items():
        fence.folder.put_new(key, data)
    dataset = open_run(fence.folder.path)
    assert_visible(dataset, [(0, 0)])
    assert dataset["status"].values.tolist() == [OK] * 4 + [0] * 8
    assert dataset["role"].values.tolist() == ["poet"] * 4 + [""] * 8


def test_damaged_shard_without_record_is_not_read(fence: Fence) -> None:
    commit_shards(fence, [(0, 0)])
    fence.folder.put_new(shard_key(RESID_POST_MEAN, 1, 0), b"damaged")
    assert_visible(open_run(fence.folder.path), [(0, 0)])


def test_damaged_coordinate_without_record_is_not_read(fence: Fence) -> None:
    commit_coordinates(fence, [0])
    fence.folder.put_new(coordinate_key("status", 1), b"damaged")
    assert open_run(fence.folder.path)["status"].values.tolist() == [OK] * 4 + [0] * 8


@given(committed=st.sets(st.sampled_from(ALL)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_of_the_shards(tmp_path_factory: pytest.TempPathFactory, committed: set[tuple[int, int]]) -> None:
    folder = LocalFolder(tmp_path_factory.mktemp("run"))
    create_group(folder.path, LAYOUT, {RESID_POST_MEAN: ""}, {})
    manifest = Manifest(identity={"model": {"name": "tiny"}}, layout=LAYOUT, tables={}, plan={}, execution={})
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        write_session(folder, manifest, manifest, {})
        commit_shards(lease.fence, sorted(committed))
        assert_visible(open_run(folder.path), committed)


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Unit 0 and 2 whole, of unit 1 only the first layers; beside it, shards without a record."""
    folder = LocalFolder(tmp_path_factory.mktemp("partly"))
    create_group(folder.path, LAYOUT, {RESID_POST_MEAN: ""}, {})
    manifest = Manifest(identity={"model": {"name": "tiny"}}, layout=LAYOUT, tables={}, plan={}, execution={})
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        write_session(folder, manifest, manifest, {})
        commit_shards(lease.fence, [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)])
        commit_coordinates(lease.fence, [0, 1, 2])
        folder.put_new(*shard(1, 1))
    return open_run(folder.path)


@pytest.mark.parametrize("role", ["poet", "hacker"])
@pytest.mark.parametrize("layer", [0, 4, [1, 3], slice(2, 4)])
def test_selection_equals_the_full_array(partly: xr.Dataset, role: str, layer: Any) -> None:
    full = partly[RESID_POST_MEAN].load().copy()
    rows = np.flatnonzero(partly["role"].values == role)
    chosen = partly.isel(rollout=rows).sel(layer=layer)[RESID_POST_MEAN]
    np.testing.assert_array_equal(chosen.values, full.values[rows][:, partly.sel(layer=layer)["layer"].values])


def indices(size: int) -> st.SearchStrategy[Any]:
    return st.integers(-size, size - 1) | st.slices(size).filter(lambda part: (part.step or 1) > 0)


@given(rows=indices(12), layers=indices(5), hidden=indices(3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_view_indexes_like_numpy(partly: xr.Dataset, rows: Any, layers: Any, hidden: Any) -> None:
    full = partly[RESID_POST_MEAN].values
    generations = np.array([[0, 0], [2, NOT_COMMITTED], [0, 0]])
    view = CommittedArray(Path(partly.attrs["run"]) / ZARR_GROUP / RESID_POST_MEAN, LAYOUT, generations)
    np.testing.assert_array_equal(view[rows, layers, hidden], full[rows, layers, hidden])


def test_dataset_survives_pickling_into_another_process(partly: xr.Dataset, tmp_path: Path) -> None:
    (tmp_path / "dataset").write_bytes(pickle.dumps(partly))
    script = f"""
import pickle, sys
dataset = pickle.load(open({str(tmp_path / "dataset")!r}, "rb"))
sys.stdout.buffer.write(dataset[{RESID_POST_MEAN!r}].values.tobytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    read = np.frombuffer(done.stdout, dtype=np.float32).reshape(12, 5, 3)
    np.testing.assert_array_equal(read, partly[RESID_POST_MEAN].values)


def test_missing_run_is_one_clear_error(tmp_path: Path) -> None:
    message = f"{tmp_path / 'nowhere'}: no run here (no run.json). Give the folder of a run, such as runs/demo."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$") as error:
        open_run(tmp_path / "nowhere")
    assert error.value.exit_code == 2


def test_a_recorded_shard_that_is_missing_is_an_error_and_not_nan(fence: Fence) -> None:
    commit_shards(fence, [(0, 0), (0, 1)])
    run = open_run(fence.folder.path)
    fence.folder.delete(shard_key(RESID_POST_MEAN, 0, 1))
    assert np.isfinite(run[RESID_POST_MEAN][:4, :3].values).all()
    with pytest.raises(IntegrityError, match=r"c/0/1/0: is recorded, but missing\."):
        run[RESID_POST_MEAN][:4].compute()
