"""Only records count; whatever is killed, and whenever, every record's object is there, whole, and the recorded one."""

import hashlib
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.store.commit import (
    Slot,
    adopt,
    commit,
    committed_slots,
    describe,
    parse_record_key,
    read_records,
    record_key,
)
from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.schema import encode_coordinate, encode_shard

SLOT: Slot = ("resid_post_mean", 3, 1)
KEY = "activations.zarr/resid_post_mean/c/3/1/0"
ROWS = range(12, 16)


def whole(body: bytes) -> bytes:
    """An object that ``inspect`` can tell from a damaged one."""
    return hashlib.sha256(body).digest() + body


def inspect(data: bytes) -> Mapping[int, str]:
    if data != whole(data[32:]):
        raise IntegrityError("damaged")
    return {13: "found dropped"}


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


def assert_records_hold(folder: LocalFolder) -> int:
    """Every record's objects are there with its length and checksum; returns how many records there are."""
    slots = committed_slots(folder)
    for slot in slots:
        for stored in read_records(folder, slot[0], slot[1])[slot].objects:
            data = folder.get(stored.key)
            assert describe(stored.key, data) == stored, slot
    return len(slots)


def test_commit_publishes_then_records(fence: Fence) -> None:
    start = time.time()
    record = commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={13: "empty response"})
    assert fence.folder.get(KEY) == b"data"
    assert read_records(fence.folder, "resid_post_mean") == {SLOT: record}
    assert (record.slot, record.rows, record.generation, record.epoch) == (SLOT, (12, 16), 0, 1)
    assert not record.adopted
    assert record.writer.endswith(f":{os.getpid()}")
    assert start <= record.committed <= time.time()
    [stored] = record.objects
    assert stored == describe(KEY, b"data")


def test_dropped_reasons_survive(fence: Fence) -> None:
    reasons = {12: "empty response", 15: "700 tokens exceed the model's context of 512 ✂"}
    commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped=reasons)
    assert read_records(fence.folder, SLOT[0], SLOT[1])[SLOT].dropped == reasons


def test_object_without_record_counts_for_nothing(fence: Fence) -> None:
    fence.folder.put_new(KEY, whole(b"orphan"))
    assert committed_slots(fence.folder) == {}
    assert read_records(fence.folder, "resid_post_mean") == {}


@pytest.mark.parametrize("resume", ["adopt", "commit"])
def test_valid_orphan_is_adopted_with_its_own_checksum(fence: Fence, resume: str) -> None:
    orphan = whole(b"computed before the crash")
    fence.folder.put_new(KEY, orphan)
    if resume == "adopt":
        record = adopt(fence, SLOT, KEY, rows=ROWS, inspect=inspect)
    else:
        record = commit(fence, SLOT, {KEY: whole(b"computed again")}, rows=ROWS, dropped={}, inspect=inspect)
    assert record is not None
    assert record.adopted
    assert record.objects[0].sha256 == describe(KEY, orphan).sha256
    assert record.dropped == {13: "found dropped"}
    assert fence.folder.get(KEY) == orphan
    assert read_records(fence.folder, SLOT[0]) == {SLOT: record}


def test_damaged_orphan_is_not_adopted_but_replaced(fence: Fence) -> None:
    fence.folder.put_new(KEY, b"damaged")
    assert adopt(fence, SLOT, KEY, rows=ROWS, inspect=inspect) is None
    assert committed_slots(fence.folder) == {}
    record = commit(fence, SLOT, {KEY: whole(b"again")}, rows=ROWS, dropped={12: "r"}, inspect=inspect)
    assert fence.folder.get(KEY) == whole(b"again")
    assert not record.adopted
    assert record.dropped == {12: "r"}
    assert assert_records_hold(fence.folder) == 1


def test_orphan_without_inspection_is_replaced(fence: Fence) -> None:
    fence.folder.put_new(KEY, b"orphan")
    assert not commit(fence, SLOT, {KEY: b"new"}, rows=ROWS, dropped={}).adopted
    assert fence.folder.get(KEY) == b"new"


def test_nothing_to_adopt(fence: Fence) -> None:
    assert adopt(fence, SLOT, KEY, rows=ROWS, inspect=inspect) is None


def test_second_record_wins_nothing(fence: Fence) -> None:
    first = commit(fence, SLOT, {KEY: whole(b"first")}, rows=ROWS, dropped={}, inspect=inspect)
    second = commit(fence, SLOT, {KEY: whole(b"second")}, rows=ROWS, dropped={}, inspect=inspect)
    assert second == first
    assert fence.folder.get(KEY) == whole(b"first")


def test_committed_object_is_not_replaced_by_the_same_generation(fence: Fence) -> None:
    first = commit(fence, SLOT, {KEY: b"first"}, rows=ROWS, dropped={})
    assert commit(fence, SLOT, {KEY: b"second"}, rows=ROWS, dropped={}) == first
    assert fence.folder.get(KEY) == b"first"
    assert assert_records_hold(fence.folder) == 1


def test_highest_generation_counts(fence: Fence) -> None:
    commit(fence, SLOT, {KEY: b"damaged later"}, rows=ROWS, dropped={})
    repaired = commit(fence, SLOT, {KEY: b"repaired"}, rows=ROWS, dropped={12: "r"}, generation=1)
    assert fence.folder.get(KEY) == b"repaired"
    assert committed_slots(fence.folder) == {SLOT: 1}
    assert read_records(fence.folder, SLOT[0]) == {SLOT: repaired}
    assert fence.folder.exists(record_key(SLOT, 0))


def test_fenced_out_writer_publishes_nothing(fence: Fence) -> None:
    old = Fence(fence.folder, fence.epoch - 1)
    fence.folder.put_new("orphan", whole(b""))

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in fence.folder.path.rglob("*") if path.is_file()}

    before = {path: data for path, data in state().items() if "lease" not in path}
    for generation in (0, 1):
        with pytest.raises(LeaseError, match="lease epoch 0 has ended"):
            commit(old, SLOT, {KEY: b"late"}, rows=ROWS, dropped={}, generation=generation)
    with pytest.raises(LeaseError, match="lease epoch 0 has ended"):
        adopt(old, SLOT, "orphan", rows=ROWS, inspect=inspect)
    assert {path: data for path, data in state().items() if "lease" not in path} == before


def test_checksums_tell_two_contents_apart() -> None:
    layout = Layout(segments=(2,), layers=3, hidden=4, unit_rows=2, layer_group=3)
    values = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float32)
    shards = [encode_shard(value, layout, "lossless") for value in values]
    assert describe(KEY, shards[0]) != describe(KEY, shards[1])
    chunks = [encode_coordinate(np.full(2, value, dtype=np.int32), layout, "question") for value in (1, 2)]
    assert describe(KEY, chunks[0]) != describe(KEY, chunks[1])


SLOTS = st.tuples(st.sampled_from(["rollouts", "a.b", "resid_post_mean"]), st.integers(0, 10**7), st.integers(0, 2000))


@given(SLOTS, st.integers(0, 2000))
def test_record_keys_round_trip(slot: Slot, generation: int) -> None:
    assert parse_record_key(record_key(slot, generation)) == (slot, generation)


@given(st.lists(st.tuples(SLOTS, st.integers(0, 2)), max_size=5))
@settings(max_examples=15, deadline=None)
def test_listing_names_equals_the_records(records: list[tuple[Slot, int]]) -> None:
    with tempfile.TemporaryDirectory() as path, acquire(LocalFolder(Path(path)), timeout=60, say=print) as lease:
        folder = lease.fence.folder
        for slot, generation in records:
            commit(lease.fence, slot, {}, rows=range(1), dropped={}, generation=generation)
        committed = committed_slots(folder)
        assert committed == {slot: max(g for s, g in records if s == slot) for slot, _ in records}
        for array, unit, _ in committed:
            for slot, record in read_records(folder, array, unit).items():
                assert (record.slot, record.generation) == (slot, committed[slot])
            assert committed_slots(folder, unit) == {s: g for s, g in committed.items() if s[1] == unit}


def test_kill_9_never_leaves_a_record_without_its_object(tmp_path: Path) -> None:
    folder, chance = LocalFolder(tmp_path / "run"), random.Random(1)
    processes = multiprocessing.get_context("fork")

    def drive() -> None:
        """Take over, adopt or commit every slot that has no record, with other bytes at every attempt."""
        with acquire(folder, timeout=60, say=print) as lease:
            done = committed_slots(folder)
            for slot in [("array", unit, group) for unit in range(2000) for group in range(2)]:
                key = f"objects/{slot[1]}/{slot[2]}"
                if slot in done or adopt(lease.fence, slot, key, rows=range(1), inspect=inspect):
                    continue
                data = whole(os.urandom(1 + slot[1] * 7919 % 100_000))
                commit(lease.fence, slot, {key: data}, rows=range(1), dropped={}, inspect=inspect)

    records: dict[Slot, object] = {}
    orphans = 0
    for _ in range(15):
        driver = processes.Process(target=drive)
        driver.start()
        time.sleep(chance.uniform(0.02, 0.15))
        driver.kill()
        driver.join()
        orphans += sum(1 for _ in folder.list("objects")) - assert_records_hold(folder)
        now = read_records(folder, "array")
        assert now.items() >= records.items()  # What was committed before is as it was.
        records = now
    assert len(records) > 15
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        assert lease.epoch > 5
    assert sum(record.adopted for record in read_records(folder, "array").values()) <= orphans
