"""One suite for every storage: what the ``Folder`` protocol promises holds on disk, over NFS and on S3."""

import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr

from personaspace.store.location import open_folder
from personaspace.store.objects import Folder
from tests.store.storages import background, in_processes, in_threads, objects

BAD_KEYS = [
    "../x",
    "a/../../x",
    "/etc/x",
    "",
    "a//b",
    "a/",
    "./a",
    "a/..",
    "a b",
    "ä",
    "a\n",
    "a\\b",
    "a?b",
    "%2e%2e/x",
]


def keys(folder: Folder, prefix: str = "") -> list[str]:
    return [entry.key for entry in objects(folder, prefix)]


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3_000_000)], ids=["empty", "small", "3 MB"])
def test_objects_come_back_whole(storage: Folder, data: bytes) -> None:
    assert not storage.exists("a/b/c")
    assert storage.put_new("a/b/c", data)
    assert storage.exists("a/b/c")
    assert storage.get("a/b/c") == data
    storage.replace("a/b/c", data + b"more")
    assert storage.get("a/b/c") == data + b"more"
    storage.replace("d", data)
    assert storage.get("d") == data


def test_put_new_leaves_what_is_there(storage: Folder) -> None:
    assert storage.put_new("a", b"first")
    assert not storage.put_new("a", b"second")
    assert not storage.put_new("a", b"first")
    assert storage.get("a") == b"first"


def test_one_of_eight_threads_wins_put_new(storage: Folder) -> None:
    for key in ("a", "b/c", "b/d", "e/f/g"):
        won = in_threads(lambda index, key=key: storage.put_new(key, bytes([index]) * 50_000), 8)  # type: ignore[misc]
        assert sum(won) == 1
        assert storage.get(key) == bytes([won.index(True)]) * 50_000


def put_own(index: int, storage: Folder, count: int) -> list[bool]:
    return [storage.put_new(f"races/{number}", bytes([index]) * 20_000) for number in range(count)]


def test_one_of_four_processes_wins_put_new(storage: Folder) -> None:
    won = in_processes(put_own, 4, storage, 20)
    for number in range(20):
        [winner] = [index for index in range(4) if won[index][number]]
        assert storage.get(f"races/{number}") == bytes([winner]) * 20_000


@pytest.mark.parametrize("expected", [None, b"old"])
def test_one_of_eight_threads_wins_compare_and_swap(storage: Folder, expected: bytes | None) -> None:
    for key in ("a", "b/c", "d"):
        if expected is not None:
            storage.replace(key, expected)
        won = in_threads(
            lambda index, key=key: storage.compare_and_swap(key, expected, b"%d" % index),  # type: ignore[misc]
            8,
        )
        assert sum(won) == 1
        assert storage.get(key) == b"%d" % won.index(True)


def count_up(index: int, storage: Folder, steps: int) -> None:
    """Add one to the shared counter ``steps`` times; a look at the current value may be outdated at once."""
    done = 0
    while done < steps:
        seen = storage.get("counter")
        # The process's own mark: an equal value by another one must not look like a success of this.
        number = int(seen.split()[0])
        done += storage.compare_and_swap("counter", seen, b"%d of %d, %d" % (number + 1, index, done))


def test_no_swap_of_four_processes_is_lost(storage: Folder) -> None:
    storage.put_new("counter", b"0")
    in_processes(count_up, 4, storage, 12)
    assert storage.get("counter").startswith(b"48 ")


def test_compare_and_swap_replaces_only_what_was_seen(storage: Folder) -> None:
    assert not storage.compare_and_swap("a", b"old", b"new")
    assert not storage.exists("a")
    assert storage.compare_and_swap("a", None, b"old")
    assert not storage.compare_and_swap("a", None, b"new")
    assert not storage.compare_and_swap("a", b"other", b"new")
    assert storage.get("a") == b"old"
    assert storage.compare_and_swap("a", b"old", b"new")
    assert storage.get("a") == b"new"


def test_repeated_compare_and_swap_after_a_lost_answer_is_true(storage: Folder) -> None:
    for expected, data in [(None, b"first"), (b"first", b"second")]:
        for _ in range(3):
            assert storage.compare_and_swap("a", expected, data)
    assert not storage.compare_and_swap("a", None, b"first")


def rewrite_forever(storage: Folder) -> None:
    count = 0
    while True:
        count += 1
        storage.replace("object", bytes([count % 251]) * 300_000)


def test_readers_see_whole_objects_while_they_are_replaced(storage: Folder) -> None:
    storage.replace("object", bytes(300_000))
    seen = set()
    with background(rewrite_forever, storage):
        deadline = time.monotonic() + 20
        while len(seen) < 5 and time.monotonic() < deadline:
            data = storage.get("object")
            assert len(data) == 300_000
            assert len(set(data)) == 1
            seen.add(data[:1])
    assert len(seen) == 5


def test_listing_is_bounded_by_the_prefix(storage: Folder) -> None:
    before = time.time()
    for key in ("commits/000002/b", "commits/000000/z", "commits/000000/a", "commits2/x", "commit", "rollouts/y"):
        storage.put_new(key, key.encode())
    assert keys(storage, "commits") == ["commits/000000/a", "commits/000000/z", "commits/000002/b"]
    assert keys(storage, "commits/000000") == ["commits/000000/a", "commits/000000/z"]
    assert set(keys(storage)) == set(keys(storage, "commits")) | {"commit", "commits2/x", "rollouts/y"}
    for prefix in ("absent", "comm", "commit", "commits/0", "commits/000002/b"):
        assert keys(storage, prefix) == []
    for entry in objects(storage):
        assert entry.bytes == len(entry.key)
        assert before - 2 < entry.modified < time.time() + 2


def test_listing_is_sorted_by_key(storage: Folder, request: pytest.FixtureRequest) -> None:
    for key in ("b", "a/z", "a/b/c", "a-b/x", "a.b", "a/a"):
        storage.put_new(key, b"")
    assert keys(storage) == ["a-b/x", "a.b", "a/a", "a/b/c", "a/z", "b"]


def test_listing_goes_beyond_one_page(storage: Folder) -> None:
    """S3 answers with 1000 keys at a time."""
    names = [f"many/{number:04d}" for number in range(1100)]
    in_threads(lambda index: [storage.put_new(name, b"") for name in names[index::8]], 8)
    assert keys(storage, "many") == names


def test_deleted_objects_leave_no_trace(storage: Folder) -> None:
    storage.put_new("a/b/c", b"data")
    storage.put_new("a/d", b"data")
    storage.delete("a/b/c")
    storage.delete("a/b/c")
    storage.delete("never/there")
    assert not storage.exists("a/b/c")
    assert keys(storage) == ["a/d"]
    assert storage.child("a").children() == []
    with pytest.raises(FileNotFoundError):
        storage.get("a/b/c")
    assert storage.put_new("a/b/c", b"again")


def test_children_are_the_folders_directly_inside(storage: Folder) -> None:
    assert storage.children() == []
    storage.child("one").put_new("run.json", b"")
    storage.child("two").child("three").put_new("x", b"")
    storage.put_new("file", b"")
    assert [name for name in storage.children() if not name.startswith(".")] == ["one", "two"]
    assert storage.child("two").children() == ["three"]
    assert storage.get("two/three/x") == b""
    assert (storage.child("one").name, storage.child("one").url) == ("one", f"{storage.url}/one")


def test_folders_are_no_objects(storage: Folder, request: pytest.FixtureRequest) -> None:
    storage.put_new("commits/000000/x", b"")
    assert not storage.exists("commits")
    with pytest.raises(FileNotFoundError):
        storage.get("commits")


def test_missing_objects(storage: Folder) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.get("absent/too")
    assert not storage.exists("absent")
    assert keys(storage) == []
    storage.sync("absent")
    assert storage.clear_scratch() == 0


@pytest.mark.parametrize("key", BAD_KEYS)
def test_keys_that_could_leave_the_folder_are_refused(storage: Folder, key: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: storage.get(key),
        lambda: storage.exists(key),
        lambda: storage.delete(key),
        lambda: storage.put_new(key, b"data"),
        lambda: storage.replace(key, b"data"),
        lambda: storage.compare_and_swap(key, None, b"data"),
        lambda: storage.child(key),
        lambda: storage.zarr_store(key),
    ]
    if key:  # An empty prefix is the whole folder.
        calls.append(lambda: list(storage.list(key)))
    for call in calls:
        with pytest.raises(ValueError, match=r"is not an object key: use letters, digits, '\.', '_', '-' between"):
            call()
    assert keys(storage) == []


def fetch(_: int, storage: Folder) -> tuple[bytes, str]:
    return storage.get("a"), repr(storage)


def test_folder_works_in_other_processes_and_carries_no_credentials(storage: Folder) -> None:
    storage.put_new("a", b"data")  # It is connected, then pickled.
    pickled = pickle.dumps(storage)
    assert pickle.loads(pickled) == storage
    assert in_processes(fetch, 2, storage) == [(b"data", repr(storage))] * 2
    for name, value in os.environ.items():
        if name.startswith("AWS_") and "KEY" in name:
            assert value.encode() not in pickled
            assert value not in repr(storage)


def test_url_opens_the_same_folder(storage: Folder) -> None:
    storage.put_new("a", b"data")
    for url in (storage.url, f"{storage.url}/"):
        again = open_folder(url)
        assert (again.url, again.name, again.get("a")) == (storage.url, "run", b"data")


def test_zarr_store_reads_and_writes(storage: Folder) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    written = zarr.create_array(storage.zarr_store("group/array", read_only=False), data=values, chunks=(2, 6))
    storage.sync("group/array")
    assert written.shape == (4, 6)
    assert set(keys(storage, "group")) == {"group/array/c/0/0", "group/array/c/1/0", "group/array/zarr.json"}
    read = zarr.open_array(storage.zarr_store("group/array"), mode="r")
    np.testing.assert_array_equal(read[...], values)
    with pytest.raises(ValueError, match="read-only"):
        zarr.create_array(storage.zarr_store("other"), data=values)
    assert keys(storage, "other") == []


def test_scratch_is_cleared_and_objects_are_not(storage: Folder) -> None:
    storage.put_new("a", b"data")
    storage.clear_scratch()
    assert storage.clear_scratch() == 0
    assert storage.get("a") == b"data"
    assert [entry.key for entry in storage.list() if entry.key.startswith(".tmp")] == []
