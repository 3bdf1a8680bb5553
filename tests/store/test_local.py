"""Files appear whole or not at all, and of several writers exactly one wins: also with kill -9, also over NFS."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr

from personaspace.store import local
from personaspace.store.errors import StorageError
from personaspace.store.local import LocalFolder
from personaspace.store.objects import LOCK, SCRATCH

PROCESSES = multiprocessing.get_context("fork")
"""Forked: a fresh interpreter takes a second to import, a forked one a millisecond to start."""


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def in_processes(task: Callable[[int], bool], count: int) -> list[int]:
    """Run ``task(index)`` in processes that start at the same moment; the indices that returned True."""
    barrier, queue = PROCESSES.Barrier(count), PROCESSES.Queue()

    def run(index: int) -> None:
        barrier.wait()
        queue.put((index, task(index)))

    processes = [PROCESSES.Process(target=run, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    return [index for index, won in answers if won]


def scratch_files(folder: LocalFolder) -> list[Path]:
    return list((folder.path / SCRATCH).glob("*"))


def test_put_new_publishes_once(folder: LocalFolder) -> None:
    assert folder.put_new("a/b/c", b"first")
    assert not folder.put_new("a/b/c", b"second")
    assert folder.get("a/b/c") == b"first"
    assert scratch_files(folder) == []


@pytest.mark.parametrize("attempt", range(3))
def test_one_process_wins_put_new(folder: LocalFolder, attempt: int) -> None:
    [winner] = in_processes(lambda index: folder.put_new("shard", bytes([index]) * 100_000), 6)
    assert folder.get("shard") == bytes([winner]) * 100_000
    assert scratch_files(folder) == []


def test_one_thread_wins_put_new(folder: LocalFolder) -> None:
    with ThreadPoolExecutor(8) as threads:
        for key in ("a", "b", "c"):
            won = list(threads.map(lambda index, key=key: folder.put_new(key, bytes([index]) * 50_000), range(8)))
            assert sum(won) == 1
            assert folder.get(key) == bytes([won.index(True)]) * 50_000


def test_replace_is_seen_whole(folder: LocalFolder) -> None:
    folder.replace("shard", b"a" * 200_000)

    def rewrite() -> None:
        for index in range(10_000):
            folder.replace("shard", b"ab"[index % 2 : index % 2 + 1] * 200_000)

    writer = PROCESSES.Process(target=rewrite)
    writer.start()
    seen = set()
    deadline = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < deadline:
        data = folder.get("shard")
        assert len(data) == 200_000
        assert len(set(data)) == 1
        seen.add(data[:1])
    writer.kill()
    writer.join()
    assert seen == {b"a", b"b"}


@pytest.mark.parametrize("expected", [None, b"old"])
def test_one_process_wins_compare_and_swap(folder: LocalFolder, expected: bytes | None) -> None:
    if expected is not None:
        folder.replace("lease.json", expected)
    [winner] = in_processes(lambda index: folder.compare_and_swap("lease.json", expected, b"%d" % index), 6)
    assert folder.get("lease.json") == b"%d" % winner


def test_compare_and_swap_refuses_other_content(folder: LocalFolder) -> None:
    assert not folder.compare_and_swap("lease.json", b"old", b"new")
    assert not folder.exists("lease.json")
    assert folder.compare_and_swap("lease.json", None, b"old")
    assert not folder.compare_and_swap("lease.json", None, b"new")
    assert folder.get("lease.json") == b"old"


def test_killed_process_frees_the_lock(folder: LocalFolder) -> None:
    def swap_forever() -> None:
        while True:
            folder.compare_and_swap("lease.json", None, b"child")

    holder = PROCESSES.Process(target=swap_forever)
    holder.start()
    time.sleep(0.1)
    holder.kill()
    holder.join()
    assert folder.compare_and_swap("lease.json", b"child", b"parent")


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "", "a//b", "a/", "./a", "a b", "ä", "a\n"])
def test_keys_that_could_leave_the_folder_are_refused(folder: LocalFolder, key: str) -> None:
    message = r"is not an object key: use letters, digits, '\.', '_', '-' between slashes$"
    for call in (folder.get, folder.exists, folder.delete, folder.child, folder.zarr_store):
        with pytest.raises(ValueError, match=message):
            call(key)
    if key:  # Without a prefix, everything is listed.
        with pytest.raises(ValueError, match=message):
            list(folder.list(key))
    for write in (folder.put_new, folder.replace):
        with pytest.raises(ValueError, match=message):
            write(key, b"data")
    assert not folder.path.exists()


@pytest.mark.parametrize("key", ["../x", "", "/etc/x"])
def test_compare_and_swap_checks_the_key_before_it_writes(folder: LocalFolder, key: str) -> None:
    with pytest.raises(ValueError, match="is not an object key"):
        folder.compare_and_swap(key, None, b"data")
    assert list(folder.path.parent.rglob("*.lock")) == []


def test_list_is_sorted_and_bounded_by_the_prefix(folder: LocalFolder) -> None:
    for key in ("commits/000002/b", "commits/000000/z", "commits/000000/a", "commits/a", "commits2/x", "rollouts/y"):
        folder.put_new(key, b"")
    keys = ["commits/000000/a", "commits/000000/z", "commits/000002/b", "commits/a"]
    assert [entry.key for entry in folder.list("commits")] == keys
    assert [entry.key for entry in folder.list()] == [*keys, "commits2/x", "rollouts/y"]
    assert list(folder.list("absent")) == []


def test_list_tells_size_and_time(folder: LocalFolder) -> None:
    start = time.time()
    folder.put_new("commits/a", b"12345")
    [entry] = folder.list("commits")
    assert entry.bytes == 5
    assert start - 1 <= entry.modified <= time.time() + 1


def test_a_file_that_vanishes_while_listed_is_left_out(folder: LocalFolder) -> None:
    """A writer's scratch file may be gone between the listing of its folder and the look at it."""
    for key in ("a", "b", "c"):
        folder.put_new(f"objects/{key}", b"")
    listing = folder.list("objects")
    assert next(listing).key == "objects/a"
    (folder.path / "objects" / "b").unlink()
    assert [entry.key for entry in listing] == ["objects/c"]


def test_parts_of_an_object(folder: LocalFolder) -> None:
    folder.put_new("a/b", b"0123456789")
    assert folder.get_range("a/b", 3, 4) == b"3456"
    assert folder.get_range("a/b", 0, 10) == folder.get_tail("a/b", 10) == b"0123456789"
    assert folder.get_tail("a/b", 3) == b"789"
    assert folder.get_range("a/b", 8, 4) == b"89"  # As much as there is: the reader's checksums tell.
    assert folder.get_tail("a/b", 40) == b"0123456789"
    for read in (lambda: folder.get_range("a/c", 0, 1), lambda: folder.get_tail("a/c", 1)):
        with pytest.raises(FileNotFoundError):
            read()
    with pytest.raises(StorageError, match=r"run/a: reading it failed\. Is a directory: check"):
        folder.get_range("a", 0, 1)
    with pytest.raises(ValueError, match="is not an object key"):
        folder.get_tail("../a", 1)


def test_delete_and_missing_objects(folder: LocalFolder) -> None:
    folder.put_new("a", b"data")
    folder.delete("a")
    folder.delete("a")
    assert not folder.exists("a")
    with pytest.raises(FileNotFoundError):
        folder.get("a")


def test_deleting_leaves_no_empty_folders(folder: LocalFolder) -> None:
    folder.put_new("a/b/c", b"")
    folder.put_new("a/d", b"")
    folder.delete("a/b/c")
    assert not (folder.path / "a" / "b").exists()
    assert folder.get("a/d") == b""
    folder.delete("a/d")
    folder.clear_scratch()
    assert folder.children() == []
    assert folder.path.is_dir()


def test_children_and_child(folder: LocalFolder) -> None:
    assert folder.children() == []
    folder.child("b").put_new("run.json", b"of b")
    folder.child("a").child("deep").put_new("x", b"")
    folder.put_new("file", b"")
    folder.clear_scratch()
    assert folder.children() == ["a", "b"]
    assert folder.get("b/run.json") == b"of b"
    assert (folder.url, folder.name, folder.child("a").name) == (str(folder.path), "run", "a")
    with pytest.raises(ValueError, match="is not an object key"):
        folder.child("../other")


def test_folder_survives_pickling(folder: LocalFolder) -> None:
    folder.put_new("a", b"data")
    assert pickle.loads(pickle.dumps(folder)).get("a") == b"data"


def test_clearing_leaves_alone_what_keeps_a_lease_alive(folder: LocalFolder) -> None:
    """At the end of a session the lease is still held, and a thread goes on renewing it."""

    def renew() -> bool:
        states = [str(number).encode() for number in range(200)]
        return all(folder.compare_and_swap("lease.json", before, after) for before, after in pairwise([None, *states]))

    with ThreadPoolExecutor(1) as thread:
        renewing = thread.submit(renew)
        while not renewing.done():
            folder.clear_scratch()
        assert renewing.result()
    assert folder.get("lease.json") == b"199"


def test_kill_9_leaves_only_whole_objects(folder: LocalFolder) -> None:
    chance = random.Random(0)

    def write_forever(start: int) -> None:
        for index in range(start, start + 100_000):
            folder.put_new(f"objects/{index}", bytes([index % 251]) * (1 + index * 7919 % 300_000))

    killed_while_writing = 0
    for round_number in range(15):
        writer = PROCESSES.Process(target=write_forever, args=(round_number * 100_000,))
        writer.start()
        time.sleep(chance.uniform(0.01, 0.08))
        writer.kill()
        writer.join()
        killed_while_writing += folder.clear_scratch()
        assert scratch_files(folder) == []
    keys = [entry.key for entry in folder.list("objects")]
    assert len(keys) > 15
    assert killed_while_writing > 0
    for key in keys:
        index = int(key.removeprefix("objects/"))
        assert folder.get(key) == bytes([index % 251]) * (1 + index * 7919 % 300_000)


def test_put_new_whose_reply_is_lost_has_won(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the server links the file, its answer gets lost, and the client's repetition finds the name taken."""
    link = os.link

    def link_without_reply(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    monkeypatch.setattr(os, "link", link_without_reply)
    assert folder.put_new("commits/000000/record", b"ours")
    assert folder.get("commits/000000/record") == b"ours"
    assert not folder.put_new("commits/000000/record", b"theirs")
    assert folder.get("commits/000000/record") == b"ours"
    assert scratch_files(folder) == []


def test_put_new_after_another_writer_has_lost(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error, and the name is another file's."""
    link = os.link

    def link_too_late(source: Path, target: Path) -> None:
        target.write_bytes(b"theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", link_too_late)
    assert not folder.put_new("record", b"ours")
    assert folder.get("record") == b"theirs"


def test_compare_and_swap_that_is_repeated_has_won(folder: LocalFolder) -> None:
    assert folder.compare_and_swap("lease.json", None, b"mine")
    assert folder.compare_and_swap("lease.json", None, b"mine")
    assert not folder.compare_and_swap("lease.json", b"other", b"third")
    assert folder.get("lease.json") == b"mine"


def test_a_lock_that_is_held_too_long_is_one_clear_error(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOCK_PATIENCE", 0.3)
    folder.replace("lease.json", b"old")
    with (folder.path / LOCK).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        message = (
            f"{folder.path / LOCK}: held by another process for 0 s; it was probably stopped while it wrote. "
            "Let it go on, or kill it."
        )
        with pytest.raises(StorageError, match=f"^{re.escape(message)}$") as error:
            folder.compare_and_swap("lease.json", b"old", b"new")
        assert 0.3 <= time.monotonic() - start < 5
        assert error.value.exit_code == 6
    assert folder.compare_and_swap("lease.json", b"old", b"new")


def test_compare_and_swap_waits_for_the_lock(folder: LocalFolder) -> None:
    folder.replace("lease.json", b"old")
    lock = (folder.path / LOCK).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as thread:
        swapped = thread.submit(folder.compare_and_swap, "lease.json", b"old", b"new")
        time.sleep(0.2)
        assert folder.get("lease.json") == b"old"
        lock.close()
        assert swapped.result(timeout=10)
    assert folder.get("lease.json") == b"new"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "The disk is full: free some space."),
        (errno.EDQUOT, "The quota is used up: free some space."),
        (errno.EROFS, "The file system is read-only: choose another --store.root, or remount it."),
        (errno.EACCES, "Permission denied: make the folder writable for this user, or choose another --store.root."),
        (errno.EIO, "Input/output error: check the disk or its server."),
    ],
)
def test_a_failing_disk_is_one_clear_error(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    folder.put_new("there", b"before")
    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    message = (
        f"{folder.path}/commits/a: writing it failed. {advice} What is committed is safe; the same command resumes."
    )
    for write in (folder.put_new, folder.replace):
        with pytest.raises(StorageError, match=f"^{re.escape(message)}$"):
            write("commits/a", b"data")
    with pytest.raises(StorageError, match=re.escape(f"{folder.path}/there: writing it failed. {advice}")):
        folder.compare_and_swap("there", b"before", b"after")
    assert folder.get("there") == b"before"
    assert scratch_files(folder) == []


def test_a_file_in_place_of_a_folder_is_one_clear_error(folder: LocalFolder) -> None:
    folder.put_new("runs", b"a file")
    assert not folder.child("runs").exists("run.json")
    with pytest.raises(StorageError, match=r"run/runs/run\.json: reading it failed\. Not a directory: check"):
        folder.child("runs").get("run.json")
    with pytest.raises(StorageError, match=r"run/runs/run\.json: writing it failed\. Not a directory: check"):
        folder.child("runs").put_new("run.json", b"")


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose commits can't be listed for the moment must not look like one without commits."""
    folder.put_new("commits/000000/a", b"")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(StorageError, match=r"commits: listing it failed\. Input/output error"):
        list(folder.list("commits"))
    with pytest.raises(StorageError, match=r"run: listing it failed\. Input/output error"):
        folder.children()


def test_what_a_library_writes_is_seen_after_sync(folder: LocalFolder) -> None:
    zarr.create_array(folder.zarr_store("space/a.zarr", read_only=False), data=np.arange(3))
    folder.sync("space/a.zarr")
    assert {entry.key for entry in folder.list("space")} == {"space/a.zarr/c/0", "space/a.zarr/zarr.json"}
    np.testing.assert_array_equal(zarr.open_array(folder.zarr_store("space/a.zarr"))[:], [0, 1, 2])
    with pytest.raises(ValueError, match="read-only"):
        zarr.create_array(folder.zarr_store("space/b.zarr"), data=np.arange(3))
