"""One suite for every storage: who may write, and what a commit leaves behind, on disk, over NFS and on S3."""

import hashlib
import os
import pickle
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from personaspace.store.commit import adopt, commit
from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.lease import LEASE, Fence, acquire, read_holder
from personaspace.store.objects import Folder
from personaspace.store.records import Slot, committed_slots, describe, read_records, record_key
from tests.store.storages import background, contents, in_processes, in_threads

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
def fence(storage: Folder) -> Iterator[Fence]:
    with acquire(storage, timeout=60, say=pytest.fail) as lease:
        yield lease.fence


def take_over(folder: Folder) -> Fence:
    """The fence of a driver that takes the run from a silent one on another host."""
    holder = read_holder(folder)
    assert holder is not None
    folder.replace(LEASE, replace(holder, pid_space="another boot/pid:[1]").encode())
    return acquire(folder, timeout=0.2, say=lambda text: None).fence


def assert_records_hold(folder: Folder) -> None:
    """Every record's objects are there, with its length and checksum."""
    for array, unit, _ in committed_slots(folder):
        for record in read_records(folder, array, [unit]).values():
            for stored in record.objects:
                assert describe(stored.key, folder.get(stored.key)) == stored


def hold(storage: Folder, timeout: float) -> None:
    with acquire(storage, timeout=timeout, say=print):
        time.sleep(60)


def wait_for_epoch(storage: Folder, epoch: int) -> None:
    deadline = time.monotonic() + 30
    while (holder := read_holder(storage)) is None or holder.epoch < epoch:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_second_driver_is_refused_until_the_first_is_killed(storage: Folder) -> None:
    with background(hold, storage, 60.0) as driver:
        wait_for_epoch(storage, 1)
        with pytest.raises(LeaseError, match=rf"the run is being written by .* pid {driver.pid}\. Wait for it"):
            acquire(storage, timeout=1, say=pytest.fail)
        os.kill(driver.pid, signal.SIGSTOP)  # A stopped one is alive, too.
        with pytest.raises(LeaseError, match="is being written by"):
            acquire(storage, timeout=1, say=pytest.fail)
        driver.kill()
        driver.join()
        assert acquire(storage, timeout=60, say=pytest.fail).epoch == 2


def test_released_lease_passes_on_with_the_next_epoch(storage: Folder) -> None:
    for epoch in (1, 2, 3):
        with acquire(storage, timeout=60, say=pytest.fail) as lease:
            assert lease.epoch == epoch
            lease.fence.check()
        with pytest.raises(LeaseError, match=f"lease epoch {epoch} has ended"):
            lease.fence.check()
    assert acquire(storage, timeout=60, say=pytest.fail, after_epoch=9).epoch == 10


def test_silent_driver_of_another_host_is_replaced_after_the_timeout(storage: Folder) -> None:
    old = acquire(storage, timeout=60, say=pytest.fail)
    start = time.monotonic()
    new = take_over(storage)
    assert time.monotonic() - start >= 0.2
    new.check()
    with pytest.raises(LeaseError, match=r"lease epoch 1 has ended, .* \(epoch 2\)\."):
        pickle.loads(pickle.dumps(old.fence)).check()


def beat_as_another_host(storage: Folder) -> None:
    holder = read_holder(storage)
    assert holder is not None
    while True:
        storage.replace(LEASE, replace(holder, host="elsewhere", heartbeat=time.time()).encode())
        time.sleep(0.05)


def test_beating_driver_of_another_host_keeps_the_lease(storage: Folder) -> None:
    acquire(storage, timeout=60, say=pytest.fail)
    with background(beat_as_another_host, storage):
        while (holder := read_holder(storage)) is None or holder.host != "elsewhere":
            time.sleep(0.02)
        with pytest.raises(LeaseError, match="is being written by elsewhere pid"):
            acquire(storage, timeout=1, say=lambda text: None)


def compete(index: int, storage: Folder) -> int | None:
    try:
        return acquire(storage, timeout=60, say=print).epoch
    except LeaseError:
        return None
    finally:
        time.sleep(0.5)  # The winner lives until all have tried.


def test_one_of_five_drivers_gets_the_lease(storage: Folder) -> None:
    answers = in_processes(compete, 5, storage)
    assert sorted(answers, key=str) == [1, None, None, None, None]


@pytest.mark.parametrize("content", [b"", b"{}", b"not json"])
def test_damaged_lease_is_one_clear_error_until_it_is_mended(storage: Folder, content: bytes) -> None:
    storage.replace(LEASE, content)
    with pytest.raises(LeaseError, match=re.escape(f"{storage.url}/{LEASE}: ")):
        acquire(storage, timeout=1, say=pytest.fail)
    with pytest.raises(LeaseError, match="personaspace store repair"):
        Fence(storage, 1).check()
    assert storage.get(LEASE) == content
    lease = acquire(storage, timeout=1, say=pytest.fail, after_epoch=7, mend=True)
    assert lease.epoch == 8
    lease.fence.check()


def test_heartbeat_renews_and_ends_with_the_takeover(storage: Folder) -> None:
    with acquire(storage, timeout=1, say=pytest.fail):
        first = read_holder(storage)
        assert first is not None
        deadline = time.monotonic() + 10
        while (renewed := read_holder(storage)) == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert renewed is not None
        assert replace(renewed, heartbeat=first.heartbeat) == first
        taken = replace(renewed, epoch=2, host="elsewhere")
        storage.replace(LEASE, taken.encode())
        time.sleep(0.5)
    assert read_holder(storage) == taken  # Neither beaten nor released by the driver that lost it.


def test_commit_publishes_and_records(storage: Folder, fence: Fence) -> None:
    record = commit(fence, SLOT, {KEY: b"data", "b": b"more"}, rows=ROWS, dropped={13: "empty response ✂"}, source="s")
    assert (storage.get(KEY), storage.get("b")) == (b"data", b"more")
    assert record.objects == (describe(KEY, b"data"), describe("b", b"more"))
    assert (record.dropped, record.source, record.epoch) == ({13: "empty response ✂"}, "s", 1)
    assert committed_slots(storage) == committed_slots(storage, 3) == {SLOT: 0}
    assert read_records(storage, SLOT[0]) == read_records(storage, SLOT[0], [3]) == {SLOT: record}
    assert read_records(storage, SLOT[0], [4]) == {}


@pytest.mark.parametrize("resume", ["adopt", "commit"])
def test_valid_orphan_is_adopted(fence: Fence, resume: str) -> None:
    orphan = whole(b"computed before the crash")
    fence.folder.put_new(KEY, orphan)
    assert committed_slots(fence.folder) == {}
    if resume == "adopt":
        record = adopt(fence, SLOT, KEY, rows=ROWS, inspect=inspect, source="s")
    else:
        again = {KEY: whole(b"computed again")}
        record = commit(fence, SLOT, again, rows=ROWS, dropped={}, inspect=inspect, source="s")
    assert record is not None
    assert (record.adopted, record.dropped, record.source) == (True, {13: "found dropped"}, "s")
    assert fence.folder.get(KEY) == orphan
    assert_records_hold(fence.folder)


def test_invalid_orphan_is_replaced(fence: Fence) -> None:
    fence.folder.put_new(KEY, b"damaged")
    assert adopt(fence, SLOT, KEY, rows=ROWS, inspect=inspect) is None
    assert adopt(fence, SLOT, "absent", rows=ROWS, inspect=inspect) is None
    record = commit(fence, SLOT, {KEY: whole(b"again")}, rows=ROWS, dropped={}, inspect=inspect)
    assert not record.adopted
    assert fence.folder.get(KEY) == whole(b"again")
    assert_records_hold(fence.folder)


def test_second_writer_takes_the_record_of_the_first(fence: Fence) -> None:
    first = commit(fence, SLOT, {KEY: whole(b"first")}, rows=ROWS, dropped={}, inspect=inspect)
    before = contents(fence.folder)
    assert commit(fence, SLOT, {KEY: whole(b"second")}, rows=ROWS, dropped={}, inspect=inspect) == first
    assert commit(fence, SLOT, {KEY: b"third"}, rows=ROWS, dropped={}) == first
    assert contents(fence.folder) == before


def test_next_generation_counts_and_the_first_record_stays(fence: Fence) -> None:
    commit(fence, SLOT, {KEY: b"damaged later"}, rows=ROWS, dropped={})
    first = fence.folder.get(record_key(SLOT, 0))
    repaired = commit(fence, SLOT, {KEY: b"repaired"}, rows=ROWS, dropped={12: "r"}, generation=1)
    assert committed_slots(fence.folder) == {SLOT: 1}
    assert read_records(fence.folder, SLOT[0]) == {SLOT: repaired}
    assert fence.folder.get(record_key(SLOT, 0)) == first
    assert_records_hold(fence.folder)


def test_eight_writers_of_one_slot_agree(fence: Fence) -> None:
    for unit in range(4):
        slot, key = ("a", unit, 0), f"objects/{unit}"

        def write(index: int, slot: Slot = slot, key: str = key) -> Any:
            data = {key: whole(b"%d" % index * 1000)}
            return commit(fence, slot, data, rows=ROWS, dropped={13: "found dropped"}, inspect=inspect)

        records = in_threads(write, 8)
        assert all(record == records[0] for record in records)
    assert_records_hold(fence.folder)


def commit_all(index: int, fence: Fence) -> None:
    for unit in range(6):
        data = {f"objects/{unit}": whole(b"%d" % index * 1000)}
        commit(fence, ("a", unit, 0), data, rows=ROWS, dropped={}, inspect=inspect)


def test_four_processes_that_write_the_same_slots_agree(fence: Fence) -> None:
    in_processes(commit_all, 4, fence)
    assert len(committed_slots(fence.folder)) == 6
    assert_records_hold(fence.folder)


def test_fenced_out_writer_writes_nothing(storage: Folder) -> None:
    with acquire(storage, timeout=60, say=pytest.fail) as lease:
        old = lease.fence
        storage.put_new("orphan", whole(b""))
        take_over(storage)
        before = contents(storage, but=(LEASE,))
        for generation in (0, 1):
            with pytest.raises(LeaseError, match="lease epoch 1 has ended, the run now belongs to"):
                commit(old, SLOT, {KEY: b"late"}, rows=ROWS, dropped={}, generation=generation)
        with pytest.raises(LeaseError, match="lease epoch 1 has ended"):
            adopt(old, SLOT, "orphan", rows=ROWS, inspect=inspect)
        assert contents(storage, but=(LEASE,)) == before
    holder = read_holder(storage)
    assert holder is not None
    assert (holder.epoch, holder.released) == (2, False)
