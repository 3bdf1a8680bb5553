"""Objects appear whole or not at all, and of several writers exactly one wins: also with kill -9."""

import multiprocessing
import pickle
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from personaspace.store.objects import SCRATCH, LocalFolder

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
    for call in (folder.get, folder.exists, folder.delete, lambda key: list(folder.list(key))):
        with pytest.raises(ValueError, match=message):
            call(key)
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
    for key in ("commits/000002/b", "commits/000000/z", "commits/000000/a", "commits2/x", "rollouts/y"):
        folder.put_new(key, b"")
    assert list(folder.list("commits")) == ["commits/000000/a", "commits/000000/z", "commits/000002/b"]
    assert list(folder.list("absent")) == []


def test_delete_and_missing_objects(folder: LocalFolder) -> None:
    folder.put_new("a", b"data")
    folder.delete("a")
    folder.delete("a")
    assert not folder.exists("a")
    with pytest.raises(FileNotFoundError):
        folder.get("a")


def test_folder_survives_pickling(folder: LocalFolder) -> None:
    folder.put_new("a", b"data")
    assert pickle.loads(pickle.dumps(folder)).get("a") == b"data"


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
    keys = list(folder.list("objects"))
    assert len(keys) > 15
    assert killed_while_writing > 0
    for key in keys:
        index = int(key.removeprefix("objects/"))
        assert folder.get(key) == bytes([index % 251]) * (1 + index * 7919 % 300_000)
