"""One driver per run: who gets the lease, who waits, and who may no longer write."""

import multiprocessing
import os
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import ClassVar

import pytest

from personaspace.store.errors import LeaseError, StorageError
from personaspace.store.lease import LEASE, Fence, Holder, acquire, read_holder
from personaspace.store.local import LocalFolder
from personaspace.store.sealed import seal, unseal

PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


@pytest.fixture
def driver(folder: LocalFolder) -> Iterator[BaseProcess]:
    """A live process that holds the lease."""
    ready = PROCESSES.Event()

    def hold() -> None:
        with acquire(folder, timeout=60, say=print):
            ready.set()
            time.sleep(60)

    process = PROCESSES.Process(target=hold)
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def store_holder(folder: LocalFolder, **changes: object) -> Holder:
    """Take the lease, then edit what is stored, as if it were another driver's."""
    acquire(folder, timeout=60, say=print)
    stored = read_holder(folder)
    assert stored is not None
    edited = replace(stored, **changes)  # type: ignore[arg-type]
    folder.replace(LEASE, edited.encode())
    return edited


def attempt(folder: LocalFolder, *, timeout: float, patience: float, beat: Holder | None = None) -> str:
    """What another driver's attempt comes to within ``patience`` seconds, while the holder ``beat`` keeps beating."""
    answers = PROCESSES.Queue()

    def try_it() -> None:
        try:
            answers.put(f"epoch {acquire(folder, timeout=timeout, say=print).epoch}")
        except LeaseError as error:
            answers.put(str(error))

    process = PROCESSES.Process(target=try_it)
    process.start()
    deadline = time.monotonic() + patience
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
        if beat is not None and folder.exists(LEASE):
            folder.replace(LEASE, replace(beat, heartbeat=time.time()).encode())
    answer = "still waiting" if answers.empty() else answers.get()
    process.kill()
    process.join()
    return answer


def test_first_driver_takes_the_lease(folder: LocalFolder) -> None:
    assert read_holder(folder) is None
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        holder = read_holder(folder)
        assert holder is not None
        assert (holder.epoch, holder.host, holder.pid) == (1, socket.gethostname(), os.getpid())
        assert not holder.released
        assert not holder.has_ended()
        lease.fence.check()


def test_released_lease_is_taken_at_once_with_the_next_epoch(folder: LocalFolder) -> None:
    for epoch in (1, 2, 3):
        with suppress(ZeroDivisionError), acquire(folder, timeout=60, say=pytest.fail) as lease:
            assert lease.epoch == epoch
            1 / (epoch - 2)  # An error releases it, too.
        holder = read_holder(folder)
        assert holder is not None
        assert holder.released
        assert holder.has_ended()


def test_live_process_keeps_the_lease(folder: LocalFolder, driver: BaseProcess) -> None:
    message = (
        f"{folder.path}: the run is being written by {socket.gethostname()} pid {driver.pid}. "
        "Wait for it, stop it, or use another run."
    )
    with pytest.raises(LeaseError, match=f"^{re.escape(message)}$"):
        acquire(folder, timeout=1, say=pytest.fail)


def test_suspended_process_keeps_the_lease(folder: LocalFolder, driver: BaseProcess) -> None:
    assert driver.pid is not None
    os.kill(driver.pid, signal.SIGSTOP)
    with pytest.raises(LeaseError, match="the run is being written by"):
        acquire(folder, timeout=1, say=pytest.fail)


def test_killed_process_on_this_host_is_replaced_at_once(folder: LocalFolder, driver: BaseProcess) -> None:
    driver.kill()
    time.sleep(0.2)  # Not joined yet: a zombie is dead, too.
    assert acquire(folder, timeout=60, say=pytest.fail).epoch == 2
    driver.join()


def test_recycled_pid_is_another_driver(folder: LocalFolder) -> None:
    store_holder(folder, pid=os.getppid(), started=1.0)
    assert acquire(folder, timeout=60, say=pytest.fail).epoch == 2


@pytest.mark.parametrize("elsewhere", [{"host": "elsewhere"}, {"pid_space": "another boot/pid:[1]"}])
def test_silent_other_host_is_replaced_after_the_timeout(folder: LocalFolder, elsewhere: dict[str, str]) -> None:
    holder = store_holder(folder, **elsewhere)
    said: list[str] = []
    start = time.time()
    assert acquire(folder, timeout=1, say=said.append).epoch == 2
    assert 1 <= time.time() - start < 5
    assert said == [f"{folder.path}: last written by {holder.host} pid {holder.pid}; waiting 1 s for a sign of life."]


@pytest.mark.parametrize("heartbeat", [0.0, 4e9])
def test_clocks_of_other_hosts_do_not_matter(folder: LocalFolder, heartbeat: float) -> None:
    """Its last sign of life may seem decades old, or lie in the future: the whole timeout is waited, and no longer."""
    store_holder(folder, host="elsewhere", heartbeat=heartbeat)
    start = time.monotonic()
    assert acquire(folder, timeout=1, say=print).epoch == 2
    assert 1 <= time.monotonic() - start < 5


def test_a_stopped_clock_of_this_host_does_not_matter(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    store_holder(folder, host="elsewhere")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 10_000)
    assert acquire(folder, timeout=1, say=print).epoch == 2


def test_other_host_that_releases_while_watched_is_replaced_at_once(folder: LocalFolder) -> None:
    holder = store_holder(folder, host="elsewhere")
    released = threading.Timer(0.5, lambda: folder.replace(LEASE, replace(holder, released=True).encode()))
    released.start()
    start = time.monotonic()
    assert acquire(folder, timeout=20, say=print).epoch == 2
    assert 0.5 <= time.monotonic() - start < 10
    released.join()


def test_epochs_never_fall_behind_those_of_the_manifest(folder: LocalFolder) -> None:
    """A lease that was lost, or restored from an old copy, must not let an old writer back in."""
    with acquire(folder, timeout=60, say=pytest.fail, after_epoch=7) as lease:
        assert lease.epoch == 8
    store_holder(folder, released=True, epoch=20)
    assert acquire(folder, timeout=60, say=pytest.fail, after_epoch=7).epoch == 21


def test_other_host_that_shows_life_keeps_the_lease(folder: LocalFolder) -> None:
    holder = store_holder(folder, host="elsewhere", pid=4711)
    answer = attempt(folder, timeout=2, patience=10, beat=holder)
    assert answer == (
        f"{folder.path}: the run is being written by elsewhere pid 4711. Wait for it, stop it, or use another run."
    )


class OvertakenFolder(LocalFolder):
    """Another host takes the lease between this driver's look at it and its own attempt."""

    __slots__ = ()

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        if expected is None:
            taken = Holder(**{**unseal(data, key), "host": "elsewhere", "pid": 4711})
            self.replace(key, taken.encode())
        return LocalFolder.compare_and_swap(self, key, expected, data)


def test_driver_that_loses_the_first_race_is_refused(folder: LocalFolder) -> None:
    other = Holder(epoch=1, host="elsewhere", pid_space="x", pid=4711, started=0.0, heartbeat=time.time())
    answer = attempt(OvertakenFolder(folder.path), timeout=1, patience=6, beat=other)
    assert answer.startswith(f"{folder.path}: the run is being written by elsewhere pid 4711.")


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", seal({"epoch": 1})])
def test_unreadable_lease_is_one_clear_error(folder: LocalFolder, content: bytes) -> None:
    folder.replace(LEASE, content)
    tail = re.escape("If no driver is running, `personaspace store repair` replaces it.")
    for read in (lambda: acquire(folder, timeout=1, say=pytest.fail), Fence(folder, 1).check):
        with pytest.raises(LeaseError, match=rf"{tail}$") as error:
            read()
        assert error.value.exit_code == 3
    assert folder.get(LEASE) == content


def test_every_flipped_bit_of_a_lease_is_found(folder: LocalFolder) -> None:
    """A changed epoch or pid would let two drivers write."""
    data = store_holder(folder, released=True).encode()
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        folder.path.joinpath(LEASE).write_bytes(bytes(damaged))
        with pytest.raises(LeaseError, match="don't match their own checksum"):
            read_holder(folder)


def test_a_damaged_lease_is_replaced_only_by_a_mending_driver(folder: LocalFolder) -> None:
    store_holder(folder, epoch=5)
    folder.replace(LEASE, folder.get(LEASE)[:-9])
    assert acquire(folder, timeout=60, say=pytest.fail, after_epoch=5, mend=True).epoch == 6
    holder = read_holder(folder)
    assert holder is not None
    assert holder.pid == os.getpid()


def test_mending_takes_no_lease_from_a_live_driver(folder: LocalFolder, driver: BaseProcess) -> None:
    with pytest.raises(LeaseError, match=f"is being written by {socket.gethostname()} pid {driver.pid}"):
        acquire(folder, timeout=1, say=pytest.fail, mend=True)


def test_damaged_lease_stops_the_heartbeat_and_is_not_overwritten(folder: LocalFolder) -> None:
    lease = acquire(folder, timeout=1, say=pytest.fail)
    lease.__enter__()
    folder.replace(LEASE, b"damaged")
    time.sleep(0.5)
    assert not any(thread.name == "lease-heartbeat" for thread in threading.enumerate())
    lease.__exit__()  # What the driver did is safe; its end must not look like a failure.
    assert folder.get(LEASE) == b"damaged"


def test_heartbeat_outlasts_a_storage_that_is_away(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with acquire(folder, timeout=1, say=pytest.fail) as lease:
        monkeypatch.setattr(LocalFolder, "get", away)
        time.sleep(0.6)
        monkeypatch.undo()
        before = read_holder(folder)
        deadline = time.monotonic() + 10
        while read_holder(folder) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_holder(folder) != before
        lease.fence.check()


def away(*_: object) -> bytes:
    raise StorageError("the server does not answer")


def test_a_driver_whose_storage_is_away_at_its_end_ends_with_its_own_error(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with suppress(ZeroDivisionError), acquire(folder, timeout=60, say=pytest.fail):
        monkeypatch.setattr(LocalFolder, "get", away)
        raise ZeroDivisionError
    monkeypatch.undo()
    holder = read_holder(folder)
    assert holder is not None
    assert not holder.released


class AnswerlessFolder(LocalFolder):
    """The storage does what it is asked, and every second answer is an error."""

    __slots__ = ()
    failures: ClassVar[list[str]] = []

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        done = LocalFolder.compare_and_swap(self, key, expected, data)
        if expected is not None and len(self.failures) < 3:
            self.failures.append(key)
            raise StorageError("no answer")
        return done


def test_a_renewal_whose_answer_is_lost_does_not_end_the_lease(folder: LocalFolder) -> None:
    """What is stored then differs from what the driver believes it stored; it is still its own."""
    AnswerlessFolder.failures.clear()
    with acquire(AnswerlessFolder(folder.path), timeout=0.6, say=pytest.fail) as lease:
        deadline = time.monotonic() + 10
        while len(AnswerlessFolder.failures) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        before = read_holder(folder)
        while read_holder(folder) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert read_holder(folder) != before
        lease.fence.check()
    holder = read_holder(folder)
    assert holder is not None
    assert holder.released


def test_one_of_many_drivers_gets_the_lease(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=pytest.fail):
        pass
    answers, barrier, done = PROCESSES.Queue(), PROCESSES.Barrier(5), PROCESSES.Event()

    def compete() -> None:
        barrier.wait()
        try:
            answers.put(acquire(folder, timeout=60, say=print).epoch)
        except LeaseError:
            answers.put(None)
        done.wait(20)  # The winner stays alive until all have tried.

    processes = [PROCESSES.Process(target=compete) for _ in range(5)]
    for process in processes:
        process.start()
    epochs = [answers.get(timeout=20) for _ in processes]
    done.set()
    for process in processes:
        process.join()
    assert sorted(epochs, key=str) == [2, None, None, None, None]


def test_fence_of_an_earlier_epoch_is_refused(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=pytest.fail) as old:
        fence: Fence = pickle.loads(pickle.dumps(old.fence))
        fence.check()
    with acquire(folder, timeout=60, say=pytest.fail) as new:
        new.fence.check()
        message = (
            f"{folder.path}: lease epoch 1 has ended, the run now belongs to "
            f"{socket.gethostname()} pid {os.getpid()} (epoch 2)."
        )
        with pytest.raises(LeaseError, match=f"^{re.escape(message)}$"):
            fence.check()


def test_fence_of_a_released_or_removed_lease_is_refused(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        pass
    with pytest.raises(LeaseError, match="lease epoch 1 has ended"):
        lease.fence.check()
    folder.delete(LEASE)
    with pytest.raises(LeaseError, match="the run now belongs to nobody"):
        lease.fence.check()


def test_heartbeat_renews_and_stops_when_taken_over(folder: LocalFolder) -> None:
    with acquire(folder, timeout=1, say=pytest.fail):
        first = read_holder(folder)
        assert first is not None
        deadline = time.monotonic() + 10
        while read_holder(folder) == first and time.monotonic() < deadline:
            time.sleep(0.05)
        renewed = read_holder(folder)
        assert renewed is not None
        assert renewed.heartbeat > first.heartbeat
        assert replace(renewed, heartbeat=first.heartbeat) == first
        taken = replace(renewed, epoch=2, host="elsewhere")
        folder.replace(LEASE, taken.encode())
        time.sleep(0.5)
    assert read_holder(folder) == taken  # Neither beaten nor released by the driver that lost it.
