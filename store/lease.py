"""One driver per run: a lease with an epoch that fences out every writer of an earlier driver.

``lease.json`` names the holder (host, pid), its epoch and its last heartbeat. Taking over raises the epoch;
every publish checks it, so an actor that outlives its driver, or wakes after a takeover, writes nothing more.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from personaspace.store.errors import LeaseError
from personaspace.store.objects import LocalFolder

LEASE = "lease.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds the lease, as stored in ``lease.json``."""

    epoch: int
    """Grows with every takeover; the highest one may write."""
    host: str
    pid_space: str
    """Boot and pid namespace: pids of two containers with one host name say nothing about each other."""
    pid: int
    started: float
    """Start time of the process (Unix seconds): a recycled pid is not the same driver."""
    heartbeat: float
    """Last sign of life (Unix seconds)."""
    released: bool = False
    """The driver ended in order."""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_dead(self, timeout: float) -> bool:
        """Released, or its process is gone (same host), or silent for ``timeout`` seconds (another host)."""
        if self.released:
            return True
        if self.is_local():
            return not _is_running(self.pid, self.started)
        return time.time() - self.heartbeat > timeout

    def is_local(self) -> bool:
        """Whether the holder's pid can be looked up from this process."""
        return (self.host, self.pid_space) == (socket.gethostname(), _pid_space())


@dataclass(frozen=True, slots=True)
class Fence:
    """Checks, before each publish, that an epoch still holds the run. Picklable, for worker processes."""

    folder: LocalFolder
    epoch: int

    def check(self) -> None:
        """Raise LeaseError if another driver has taken over."""
        holder = read_holder(self.folder)
        if holder is None or holder.epoch != self.epoch or holder.released:
            now = "nobody" if holder is None else f"{holder.host} pid {holder.pid} (epoch {holder.epoch})"
            raise LeaseError(f"{self.folder.path}: lease epoch {self.epoch} has ended, the run now belongs to {now}.")


class Lease:
    """The driver's hold on a run; a context manager that keeps the heartbeat going and releases at the end."""

    def __init__(self, folder: LocalFolder, holder: Holder, interval: float) -> None:
        self.fence = Fence(folder, holder.epoch)
        self._folder = folder
        self._holder = holder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(interval,), name="lease-heartbeat", daemon=True)

    @property
    def epoch(self) -> int:
        return self._holder.epoch

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._renew(released=True)

    def _beat(self, interval: float) -> None:
        while not self._stop.wait(interval):
            if not self._renew():
                return  # Taken over: the next fence check says so where it matters.

    def _renew(self, *, released: bool = False) -> bool:
        renewed = replace(self._holder, heartbeat=time.time(), released=released)
        if not self._folder.compare_and_swap(LEASE, self._holder.encode(), renewed.encode()):
            return False
        self._holder = renewed
        return True


def read_holder(folder: LocalFolder) -> Holder | None:
    """Current content of ``lease.json``, or None where no driver ever was."""
    data = _read(folder)
    return None if data is None else _decode(folder, data)


def acquire(folder: LocalFolder, *, timeout: float, say: Callable[[str], None]) -> Lease:
    """Take the run's lease.

    A holder on this host whose process is gone is replaced at once; one on another host after ``timeout``
    seconds of silence, which ``say`` reports. Raises LeaseError if the holder shows a sign of life.
    """
    told = False
    first = None
    while True:
        data = _read(folder)
        current = None if data is None else _decode(folder, data)
        first = first or current
        if current is None or current.is_dead(timeout):
            me = psutil.Process()
            holder = Holder(
                epoch=1 if current is None else current.epoch + 1,
                host=socket.gethostname(),
                pid_space=_pid_space(),
                pid=me.pid,
                started=me.create_time(),
                heartbeat=time.time(),
            )
            if folder.compare_and_swap(LEASE, data, holder.encode()):
                return Lease(folder, holder, interval=timeout / 6)
            continue
        where = f"{current.host} pid {current.pid}"
        if current.is_local() or current != first:
            raise LeaseError(
                f"{folder.path}: the run is being written by {where}. Wait for it, stop it, or use another --store.run."
            )
        if not told:
            say(f"{folder.path}: last written by {where}; waiting up to {timeout:.0f} s for a sign of life.")
            told = True
        time.sleep(min(1.0, timeout / 10))


def _read(folder: LocalFolder) -> bytes | None:
    try:
        return folder.get(LEASE)
    except FileNotFoundError:
        return None


def _decode(folder: LocalFolder, data: bytes) -> Holder:
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise LeaseError(
            f"{folder.path / LEASE}: not a lease ({error}). If no driver is running, delete this file."
        ) from error


def _pid_space() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.readlink('/proc/self/ns/pid')}"


def _is_running(pid: int, started: float) -> bool:
    if pid == os.getpid():
        return True
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
