"""One suite for every storage: whole runs, created, grown, written by several processes, and read meanwhile."""

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import pytest
import xarray as xr
import zarr

from personaspace.store import open_run
from personaspace.store.catalog import runs, summarize
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError, LeaseError
from personaspace.store.index import write_index
from personaspace.store.layout import ZARR_GROUP, Layout, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.location import open_folder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, Manifest, read_manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.plan import read_plan
from personaspace.store.records import COORDINATES_RECORD, committed_slots
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.scores import Score, commit_scores
from personaspace.store.verify import verify
from tests.store import small_runs
from tests.store.hooks import WRITES, hooked
from tests.store.kill_run import drive
from tests.store.observer import Observer
from tests.store.small_runs import LAYOUT, commit_coordinates, commit_rollouts, commit_shards, complete, create, grow
from tests.store.storages import LOCAL_FIRST, PROCESSES, contents, in_threads, settle


@pytest.fixture
def fence(storage: Folder) -> Iterator[Fence]:
    with acquire(storage, timeout=60, say=pytest.fail) as lease:
        yield lease.fence


@pytest.fixture
def manifest(fence: Fence) -> Manifest:
    return create(fence)


def test_new_run_is_pending(storage: Folder, manifest: Manifest) -> None:
    assert read_manifest(storage) == read_manifest(storage, MANIFEST_COPY) == manifest
    assert read_plan(storage, manifest) == small_runs.planned()
    run = open_run(storage)
    assert run.sizes == {"rollout": 12, "layer": 5, "hidden": 3}
    assert np.isnan(run[RESID_POST_MEAN].values).all()
    assert not run["status"].values.any()


def test_open_run_shows_committed_data_only(storage: Folder, fence: Fence, manifest: Manifest) -> None:
    commit_rollouts(fence, LAYOUT, range(3))
    commit_shards(fence, LAYOUT, [(0, 0), (0, 1), (2, 1)])
    commit_coordinates(fence, LAYOUT, [0])
    storage.put_new(shard_key(RESID_POST_MEAN, 1, 0), small_runs.shard_bytes(LAYOUT, 1, 0))
    storage.put_new(shard_key(RESID_POST_MEAN, 1, 1), b"half a shard")
    expected = small_runs.values()
    expected[4:8] = np.nan
    expected[8:, :3] = np.nan
    run = open_run(storage)
    np.testing.assert_array_equal(run[RESID_POST_MEAN].values, expected)
    assert run["status"].values.tolist() == [1] * 4 + [0] * 8
    assert run.attrs["rollouts"] == "10 planned: 4 ok, 0 dropped, 6 pending"


def test_url_and_catalog_find_the_run(storage: Folder, fence: Fence, manifest: Manifest) -> None:
    complete(fence)
    write_index(fence, manifest)
    np.testing.assert_array_equal(open_run(storage.url)[RESID_POST_MEAN].values, small_runs.values())
    root = open_folder(storage.url.removesuffix("/run"))
    [found] = runs(root)
    assert found == summarize(storage)
    assert (found.name, found.state, found.shards, found.extracted) == ("run", "complete", 6, 10)
    assert [problem for problem in verify(storage).problems if "/.nfs" not in problem.key] == []


def test_no_run_is_one_clear_error(storage: Folder) -> None:
    with pytest.raises(InputError, match=r"no run here \(no run\.json\)\. Give the folder of a run"):
        open_run(storage)


def test_plain_xarray_and_zarr_read_without_warnings(storage: Folder, fence: Fence, manifest: Manifest) -> None:
    complete(fence, units=[0, 2])
    expected = small_runs.values()
    expected[4:8] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(storage.zarr_store(ZARR_GROUP))
        np.testing.assert_array_equal(opened[RESID_POST_MEAN].values, expected)
        assert opened["status"].values.tolist() == [1] * 4 + [0] * 4 + [1, 1, 3, 3]
        assert opened["role"].values.tolist() == ["default"] * 4 + [""] * 4 + ["hacker"] * 2 + [""] * 2
        array = zarr.open_array(storage.zarr_store(f"{ZARR_GROUP}/{RESID_POST_MEAN}"), mode="r")
        np.testing.assert_array_equal(array[:, 3], expected[:, 3])


def test_dask_workers_read_a_pickled_run(storage: Folder, fence: Fence, manifest: Manifest) -> None:
    complete(fence)
    with PROCESSES.Pool(1, initializer=settle, initargs=(dict(os.environ),)) as pool:
        found = pool.apply(_sum, (open_run(storage),))
    np.testing.assert_allclose(found, np.nansum(small_runs.values(), dtype=np.float64), rtol=1e-4)


def _sum(run: xr.Dataset) -> float:
    return float(run[RESID_POST_MEAN].sum().values)


def test_run_grows_by_a_segment(storage: Folder, fence: Fence, manifest: Manifest) -> None:
    complete(fence)
    write_index(fence, manifest)
    before = contents(storage, but=(MANIFEST, MANIFEST_COPY, "lease.json", "index"))
    grown = grow(fence, manifest, 5)
    assert grown.layout.segments == (10, 5)
    after = contents(storage)
    changed = {key for key, data in before.items() if after[key] != data}
    assert {key for key in changed if not key.endswith("zarr.json")} == set()
    run = open_run(storage)
    assert run.sizes["rollout"] == 20
    np.testing.assert_array_equal(run[RESID_POST_MEAN].values[:12], small_runs.values())
    assert np.isnan(run[RESID_POST_MEAN].values[12:]).all()
    complete(fence, grown.layout, range(3, 5))
    write_index(fence, grown)
    np.testing.assert_array_equal(open_run(storage)[RESID_POST_MEAN].values, small_runs.values(grown.layout))
    assert [row.row for row in read_plan(storage, grown)] == [*range(10), *range(12, 17)]
    assert len(committed_slots(storage)) == 5 * 4


@LOCAL_FIRST
def test_crash_while_a_run_is_made_or_grows_leaves_it_as_it_was(storage: Folder) -> None:
    """Creation and growth end before their first, second, ... write; the next driver finishes them."""
    stop, outcomes = 0, set()
    while "grown in one go" not in outcomes:
        stop += 3
        with acquire(storage.child(f"run-{stop}"), timeout=60, say=pytest.fail) as lease:
            fence = lease.fence
            made = _interrupt(fence, stop, create) or read_manifest(fence.folder) or create(fence)
            commit_shards(fence, LAYOUT, [(0, 0)])
            grown = _interrupt(fence, stop, lambda fence, made=made: grow(fence, made, 5))  # type: ignore[misc]
            stored = require_manifest(fence.folder)
            outcomes.add("grown in one go" if grown else "grown" if stored != made else "as it was")
            expected = small_runs.values(stored.layout)
            expected[4:], expected[:, 3:] = np.nan, np.nan
            np.testing.assert_array_equal(open_run(fence.folder)[RESID_POST_MEAN].values, expected)
            if stored == made:
                stored = grow(fence, made, 5)
            else:  # Between run.json and its copy. What the next driver does is to note its session.
                after = replace(stored, sessions=(*stored.sessions, {**stored.sessions[0], "epoch": 2}))
                stored = write_run(fence, stored, after, small_runs.planned(stored.layout))
            assert stored == read_manifest(fence.folder) == read_manifest(fence.folder, MANIFEST_COPY)
            assert stored.layout.segments == (10, 5)
            plain = xr.open_zarr(fence.folder.zarr_store(ZARR_GROUP))
            assert plain.sizes["rollout"] == 20
            assert [problem.detail for problem in verify(fence.folder).problems if "/.nfs" not in problem.key] == []
    assert outcomes >= {"grown in one go", "as it was"}


class Crash(Exception):
    """The process ends here."""


def _interrupt(fence: Fence, stop: int, work: Callable[[Fence], Manifest]) -> Manifest | None:
    """Do the work up to its ``stop``-th write; None if that comes."""
    writes = 0

    def before(operation: str, _: str) -> None:
        nonlocal writes
        writes += operation in WRITES
        if writes == stop:
            raise Crash

    try:
        return work(Fence(hooked(fence.folder, before), fence.epoch))
    except Crash:
        return None


def test_growing_what_another_driver_has_changed_is_refused(fence: Fence, manifest: Manifest) -> None:
    grow(fence, manifest, 5)
    with pytest.raises(LeaseError, match=r"run\.json: was changed by another driver"):
        grow(fence, manifest, 7)
    assert require_manifest(fence.folder).layout.segments == (10, 5)


def test_reader_sees_no_torn_or_uncommitted_value_while_three_processes_write(storage: Folder) -> None:
    layout = Layout(segments=(30,), layers=8, hidden=16, unit_rows=4, layer_group=2)
    # On a busy machine a whole run may pass between two looks; the next one won't.
    for number in range(5):
        folder = storage.child(f"run-{number}")
        ours, theirs = PROCESSES.Pipe(duplex=False)
        driver = PROCESSES.Process(target=_drive, args=(dict(os.environ), folder, layout, theirs))
        driver.start()
        observer = Observer(folder, layout, units=2)
        assert ours.recv() == "ready"
        observer.watch(ours.poll)
        assert ours.recv() == "done"
        driver.join()
        observer.look()
        assert observer.faults == []
        if observer.partial:
            return
    pytest.fail("the reader never saw a part of a run")


def _drive(environment: dict[str, str], storage: Folder, layout: Layout, ready: Connection) -> None:
    settle(environment)
    drive(storage, layout, 3, ready)


def test_readers_during_growth_see_the_old_run_or_the_new_one(
    storage: Folder, fence: Fence, manifest: Manifest
) -> None:
    complete(fence)
    write_index(fence, manifest)
    over = threading.Event()
    seen: set[int] = set()

    def read(_: int) -> None:
        while not over.is_set():
            run = open_run(storage)
            found = run[RESID_POST_MEAN].values
            np.testing.assert_array_equal(found[:12], small_runs.values())
            seen.add(run.sizes["rollout"])

    def write(_: int) -> None:
        try:
            grown = grow(fence, manifest, 5)
            complete(fence, grown.layout, range(3, 5))
            write_index(fence, grown)
            time.sleep(0.3)
        finally:
            over.set()

    in_threads(lambda index: (read, write)[index % 2](index), 2)
    assert 20 in seen


def test_rollouts_and_scores_come_back(storage: Folder, fence: Fence, manifest: Manifest) -> None:
    commit_rollouts(fence, LAYOUT, [0, 2])
    commit_shards(fence, LAYOUT, [(0, 0), (0, 1)])
    commit_coordinates(fence, LAYOUT, [0])
    table = read_rollouts(storage)
    assert table["row"].to_pylist() == [0, 1, 2, 3, 8, 9]
    assert table.to_pylist()[5]["messages"] == [{"role": "user", "content": "q0?"}]
    assert read_rollouts(storage, [2], ["response"])["response"].to_pylist() == ["Answer 8", "Answer 9"]
    commit_scores(fence, LAYOUT, "judge-1", 0, [Score(row=1, score=3.0, reason="yes ✂"), Score(row=2, score=0.5)])
    found = open_run(storage)["score"].values
    assert found[[1, 2]].tolist() == [3.0, 0.5]
    assert np.isnan(found[[0, 3, 8]]).all()
    assert (COORDINATES_RECORD, 0, 0) in committed_slots(storage)
