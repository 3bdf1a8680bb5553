"""Disks that are full, read-only or closed to this user: one clear error, nothing torn, and the same work goes on."""

import multiprocessing
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest

from personaspace.store import open_run
from personaspace.store.errors import PersonaspaceError, StorageError
from personaspace.store.index import write_index
from personaspace.store.lease import LEASE, Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST, read_manifest
from personaspace.store.objects import SCRATCH
from personaspace.store.records import committed_slots
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.store import small_runs
from tests.store.small_runs import LAYOUT, commit_coordinates, commit_rollouts, commit_shards, create
from tests.store.storages import contents

NOBODY = 65534
PROCESSES = multiprocessing.get_context("fork")
SAFE = r"What is committed is safe; the same command resumes\.$"


def fill(disk: Path, *, spare: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - spare))
    return ballast


def as_nobody(work: Callable[[], Any]) -> str:
    """What the work comes to for a user without rights: its answer, or its error."""
    return in_child(work, NOBODY if os.getuid() == 0 else None)


def in_child(work: Callable[[], Any], user: int | None = None) -> str:
    """What the work comes to in a process of its own, perhaps of another user: its answer, or its error."""
    ours, theirs = PROCESSES.Pipe(duplex=False)

    def run() -> None:
        try:
            if user is not None:
                os.setgid(user)
                os.setuid(user)
            with dask.config.set(scheduler="synchronous"):  # The threads of Dask's pool are not forked.
                theirs.send(f"done: {work()}")
        except PersonaspaceError as error:
            theirs.send(f"{type(error).__name__}: {error}")
        except BaseException:
            theirs.send(f"NOT EXPLAINED: {traceback.format_exc()}")

    process = PROCESSES.Process(target=run)
    process.start()
    try:
        assert ours.poll(60), "no answer"
        return str(ours.recv())
    finally:
        process.kill()
        process.join()


def drive(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        write_all(lease.fence)


def write_all(fence: Fence) -> None:
    """A whole run; what is there already is left as it is."""
    manifest = read_manifest(fence.folder) or create(fence)
    commit_rollouts(fence, LAYOUT, range(LAYOUT.units))
    commit_shards(fence, LAYOUT, small_runs.ALL)
    commit_coordinates(fence, LAYOUT, range(LAYOUT.units))
    write_index(fence, manifest)


def assert_complete(folder: LocalFolder) -> None:
    np.testing.assert_array_equal(open_run(folder)[RESID_POST_MEAN].values, small_runs.values())
    assert verify(folder).problems == ()


# Steps of one page, so that the disk gets full in every kind of write: creation, rollouts, shards, records.
@pytest.mark.parametrize("spare", range(0, 340_000, 20_480))
def test_full_disk_tears_nothing_and_the_work_goes_on_when_there_is_space(disk: Path, spare: int) -> None:
    folder = LocalFolder(disk / "run")
    ballast = fill(disk, spare=spare)
    answer = in_child(lambda: drive(folder))
    if answer == "done: None":
        assert spare > 250_000
    else:
        assert re.search(rf"^StorageError: .* it failed\. The disk is full: free some space\. {SAFE}", answer), answer
    assert list((folder.path / SCRATCH).glob("*")) == []
    before = contents(folder, but=(LEASE,))
    if read_manifest(folder) is not None:
        assert {problem.kind for problem in verify(folder).problems} <= {"orphan", "missing"}
        assert all(problem.key.endswith("run.copy.json") for problem in verify(folder).harmful)
        shown = open_run(folder)[RESID_POST_MEAN].values
        assert (np.isnan(shown) | (shown == small_runs.values())).all()
    ballast.unlink()
    drive(folder)
    assert_complete(folder)
    assert all(folder.get(key) == data for key, data in before.items() if not key.startswith("index"))


def test_full_disk_stops_neither_readers_nor_the_lease_for_good(disk: Path) -> None:
    folder = LocalFolder(disk / "run")
    with acquire(folder, timeout=1, say=pytest.fail) as lease:
        write_all(lease.fence)
        ballast = fill(disk, spare=0)
        with pytest.raises(StorageError, match=r"lease\.json: writing it failed\. The disk is full"):
            acquire(LocalFolder(disk / "other"), timeout=1, say=pytest.fail)
        np.testing.assert_array_equal(open_run(folder)[RESID_POST_MEAN].values, small_runs.values())
        beat = folder.get(LEASE)
        time.sleep(0.5)
        assert folder.get(LEASE) == beat  # It can't be renewed, and the thread tries on.
        ballast.unlink()
        deadline = time.monotonic() + 10
        while folder.get(LEASE) == beat:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lease.fence.check()
    assert acquire(folder, timeout=1, say=pytest.fail).epoch == 2


def test_read_only_disk_is_read_and_not_written(disk: Path) -> None:
    folder = LocalFolder(disk / "run")
    drive(folder)
    before = contents(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert_complete(folder)
    for work in (
        lambda: acquire(folder, timeout=60, say=pytest.fail),
        lambda: folder.put_new("a", b"data"),
        lambda: folder.replace("a", b"data"),
        lambda: folder.compare_and_swap("a", None, b"data"),
        lambda: folder.delete(MANIFEST),
        lambda: LocalFolder(disk / "new").put_new("a", b"data"),
    ):
        with pytest.raises(StorageError, match=rf"file system is read-only: choose another --store\.root.*{SAFE}"):
            work()
    assert contents(folder) == before
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    acquire(folder, timeout=60, say=pytest.fail).fence.check()


@pytest.fixture
def foreign(open_place: Path) -> LocalFolder:
    """A complete run that another user may read."""
    folder = LocalFolder(open_place / "runs" / "run")
    drive(folder)
    return folder


def test_run_of_another_user_is_read_and_not_written(foreign: LocalFolder) -> None:
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(foreign.path)], check=True)
    before = contents(foreign)
    assert as_nobody(lambda: assert_complete(foreign)) == "done: None"
    for work in (
        lambda: acquire(foreign, timeout=60, say=print),
        lambda: foreign.put_new("a", b"data"),
        lambda: foreign.replace(MANIFEST, b"data"),
        lambda: foreign.delete(MANIFEST),
        lambda: LocalFolder(foreign.path.parent / "new").put_new("a", b"data"),
    ):
        answer = as_nobody(work)
        assert answer.startswith(f"StorageError: {foreign.path.parent}/"), answer
        assert "Permission denied: make the folder writable for this user, or choose another --store.root." in answer
    assert contents(foreign) == before


@pytest.mark.parametrize("closed", ["commits", "commits/000001", "activations.zarr", "plan", "", MANIFEST, LEASE])
def test_what_may_not_be_read_is_an_error_and_never_missing(foreign: LocalFolder, closed: str) -> None:
    """Commits that can't be listed for this user must not look like a run without them."""
    os.chmod(foreign.path / closed, 0)
    for work in (
        lambda: len(committed_slots(foreign)) + len(open_run(foreign)[RESID_POST_MEAN].values),
        lambda: acquire(foreign, timeout=60, say=print),
        lambda: verify(foreign),
    ):
        answer = as_nobody(work)
        readable = closed == LEASE and answer == "done: 24"
        assert readable or (answer.startswith("StorageError: ") and "Permission denied" in answer), answer
