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

from personaspace.store.commit import adopt, commit, publish
from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import (
    Record,
    Slot,
    committed_slots,
    describe,
    parse_record_key,
    read_object,
    read_record,
    read_records,
    record_key,
)
from personaspace.store.schema import encode_coordinate, encode_shard
from personaspace.store.sealed import seal, unseal

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
        for stored in read_records(folder, slot[0], [slot[1]])[slot].objects:
            data = folder.get(stored.key)
            assert describe(stored.key, data) == stored, slot
    return len(slots)


def test_commit_publishes_then_records(fence: Fence) -> None:
    start = time.time()
    record = commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={13: "the response is empty"})
    assert fence.folder.get(KEY) == b"data"
    assert read_records(fence.folder, "resid_post_mean") == {SLOT: record}
    assert (record.slot, record.rows, record.generation, record.epoch) == (SLOT, (12, 16), 0, 1)
    assert not record.adopted
    assert record.writer.endswith(f":{os.getpid()}")
    assert start <= record.committed <= time.time()
    [stored] = record.objects
    assert stored == describe(KEY, b"data")


def test_dropped_reasons_survive(fence: Fence) -> None:
    reasons = {12: "the response is empty", 15: "700 tokens exceed the model's context of 512 ✂"}
    commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped=reasons)
    assert read_records(fence.folder, SLOT[0], [SLOT[1]])[SLOT].dropped == reasons


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


def test_records_tell_what_they_were_made_from(fence: Fence) -> None:
    covers = ("resid_post_mean.000", "resid_post_mean.001")
    made = commit(fence, SLOT, {KEY: b"x"}, rows=ROWS, dropped={}, source="ab" * 32, covers=covers, generation=2)
    assert read_record(fence.folder, SLOT, 2) == made
    assert (made.source, made.covers, made.generation) == ("ab" * 32, covers, 2)
    fence.folder.put_new("other", whole(b"orphan"))
    found = adopt(fence, ("a", 3, 0), "other", rows=ROWS, inspect=inspect, source="cd" * 32, generation=1)
    assert found is not None
    assert (found.source, found.covers, found.generation, found.key) == ("cd" * 32, (), 1, record_key(("a", 3, 0), 1))


def test_all_objects_of_a_record_are_published(fence: Fence) -> None:
    objects = {f"activations.zarr/{name}/c/3": name.encode() for name in ("role", "status")}
    record = commit(fence, ("coordinates", 3, 0), objects, rows=ROWS, dropped={})
    assert record.objects == tuple(describe(key, data) for key, data in objects.items())
    assert {key: fence.folder.get(key) for key in objects} == objects


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


def test_a_generation_above_the_first_replaces_without_inspection(fence: Fence) -> None:
    """A repair makes again what was found wrong, however whole it looks."""
    commit(fence, SLOT, {KEY: whole(b"wrong")}, rows=ROWS, dropped={}, inspect=inspect)
    repaired = commit(fence, SLOT, {KEY: whole(b"right")}, rows=ROWS, dropped={}, generation=1, inspect=inspect)
    assert not repaired.adopted
    assert fence.folder.get(KEY) == whole(b"right")
    assert read_object(fence.folder, repaired.objects[0]) == whole(b"right")
    assert read_records(fence.folder, SLOT[0]) == {SLOT: repaired}


def test_an_object_that_is_not_its_record_is_refused(fence: Fence) -> None:
    [stored] = commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={}).objects
    assert read_object(fence.folder, stored) == b"data"
    fence.folder.replace(KEY, b"dada")
    with pytest.raises(IntegrityError, match=rf"^{fence.folder.url}/{KEY}: 4 bytes that differ from their record\.$"):
        read_object(fence.folder, stored)
    fence.folder.delete(KEY)
    with pytest.raises(IntegrityError, match=rf"^{fence.folder.url}/{KEY}: is recorded, but missing\.$"):
        read_object(fence.folder, stored)


def test_publish_replaces_only_what_it_saw(fence: Fence) -> None:
    assert publish(fence, KEY, b"new") == (b"new", None)
    assert publish(fence, KEY, b"new") == (b"new", None)
    assert publish(fence, KEY, b"newer") == (b"newer", None)
    found = whole(b"found")
    fence.folder.replace(KEY, found)
    assert publish(fence, KEY, whole(b"mine"), inspect) == (found, {13: "found dropped"})
    assert fence.folder.get(KEY) == found


class OvertakenFolder(LocalFolder):
    """A successor publishes between this writer's look at an object and its attempt to replace it."""

    __slots__ = ()

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        self.replace(key, whole(b"the successor's"))
        return LocalFolder.compare_and_swap(self, key, expected, data)


def test_a_paused_writer_does_not_undo_its_successors_work(fence: Fence) -> None:
    folder = OvertakenFolder(Path(fence.folder.url))
    folder.put_new(KEY, b"damaged")
    data, reasons = publish(Fence(folder, fence.epoch), KEY, whole(b"late"), inspect)
    assert (data, reasons) == (whole(b"the successor's"), {13: "found dropped"})
    assert folder.get(KEY) == whole(b"the successor's")


def test_records_by_unit_and_by_array(fence: Fence) -> None:
    for slot in (("a", 1, 0), ("a", 2, 0), ("b", 2, 0), ("a.b", 2, 1)):
        commit(fence, slot, {}, rows=ROWS, dropped={})
    assert read_records(fence.folder, "a").keys() == {("a", 1, 0), ("a", 2, 0)}
    assert read_records(fence.folder, "a", [2]).keys() == {("a", 2, 0)}
    assert read_records(fence.folder, "a.b").keys() == {("a.b", 2, 1)}
    assert read_records(fence.folder, "a", iter([1, 2])).keys() == {("a", 1, 0), ("a", 2, 0)}


@pytest.mark.parametrize("name", [".nfs000000000123", "coordinates.000.000.json~", "x.json", "a.b.000.json", "README"])
def test_what_network_storage_leaves_among_records_is_no_record(fence: Fence, name: str) -> None:
    commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={})
    for key in (f"commits/000003/{name}", f"commits/{name}", "commits/notes/resid_post_mean.001.000.json"):
        file = Path(fence.folder.url) / key
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"not a record")
    assert committed_slots(fence.folder) == committed_slots(fence.folder, 3) == {SLOT: 0}
    assert read_records(fence.folder, SLOT[0]).keys() == {SLOT}


def test_every_flipped_bit_of_a_record_is_found(fence: Fence) -> None:
    record = commit(fence, SLOT, {KEY: b"data"}, rows=range(12, 13), dropped={12: "r"})
    data = record.encode()
    assert Record.decode(data, "here") == record
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError, match=r"^here: "):
            Record.decode(bytes(damaged), "here")


def test_a_damaged_record_is_an_error_and_not_an_absent_one(fence: Fence) -> None:
    record = commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={})
    fence.folder.replace(record.key, record.encode()[:-20])
    where = f"^{fence.folder.url}/{record.key}: .* don't match their own checksum"
    for read in (
        lambda: read_records(fence.folder, SLOT[0]),
        lambda: read_record(fence.folder, SLOT, 0),
        lambda: commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={}),
    ):
        with pytest.raises(IntegrityError, match=where):
            read()
    assert committed_slots(fence.folder) == {SLOT: 0}


def test_a_record_of_another_slot_is_refused(fence: Fence) -> None:
    record = commit(fence, SLOT, {KEY: b"data"}, rows=ROWS, dropped={})
    fence.folder.put_new(record_key(("resid_post_mean", 4, 1), 0), record.encode())
    wrong = record_key(("resid_post_mean", 4, 1), 0)
    with pytest.raises(IntegrityError, match=rf"^{fence.folder.url}/{wrong}: holds the record {record.key}\.$"):
        read_records(fence.folder, SLOT[0], [4])


@pytest.mark.parametrize("changes", [{"rows": 3}, {"objects": [{}]}, {"dropped": {"x": "r"}}, {"more": 1}])
def test_a_sealed_document_that_is_no_record_is_refused(fence: Fence, changes: dict[str, object]) -> None:
    record = commit(fence, SLOT, {}, rows=ROWS, dropped={})
    with pytest.raises(IntegrityError, match=r"^here: not a record \("):
        Record.decode(seal({**unseal(record.encode(), ""), **changes}), "here")


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
            for slot, record in read_records(folder, array, [unit]).items():
                assert (record.slot, record.generation) == (slot, committed[slot])
            assert committed_slots(folder, unit) == {s: g for s, g in committed.items() if s[1] == unit}
            assert (
                read_records(folder, array, [unit, unit, 10**7 + 1]).keys()
                == read_records(folder, array, [unit]).keys()
            )
        assert read_records(folder, "rollouts", []) == {}
        assert read_records(folder, "rollouts").keys() == {slot for slot in committed if slot[0] == "rollouts"}


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
