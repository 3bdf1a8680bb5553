"""One driver per run: a lease with an epoch that fences out every writer of an earlier driver.

``lease.json`` names the holder (host, pid), its epoch and its last heartbeat. Taking over raises the epoch;
every publish checks it, so an actor that outlives its driver, or wakes after a takeover, writes nothing more.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from personaspace.store.errors import IntegrityError, LeaseError, StorageError
from personaspace.store.objects import Folder
from personaspace.store.sealed import seal, unseal

LEASE = "lease.json"
BEATS = 6
"""Heartbeats in one timeout: so many may fail before anybody takes over."""


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

    @property
    def where(self) -> str:
        return f"{self.host} pid {self.pid}"

    def encode(self) -> bytes:
        return seal(asdict(self))

    def has_ended(self) -> bool:
        """Whether the driver is known to be gone: released, or its process on this host is no more."""
        return self.released or (self.is_local() and not _is_running(self.pid, self.started))

    def is_local(self) -> bool:
        """Whether the holder's pid can be looked up from this process."""
        return (self.host, self.pid_space) == (socket.gethostname(), _pid_space())

    def is_same_driver(self, other: "Holder") -> bool:
        return replace(self, heartbeat=0, released=False) == replace(other, heartbeat=0, released=False)


@dataclass(frozen=True, slots=True)
class Fence:
    """Checks, before each publish, that an epoch still holds the run. Picklable, for worker processes."""

    folder: Folder
    epoch: int

    def check(self) -> None:
        """Raise LeaseError if another driver has taken over."""
        holder = read_holder(self.folder)
        if holder is None or holder.epoch != self.epoch or holder.released:
            now = "nobody" if holder is None else f"{holder.where} (epoch {holder.epoch})"
            raise LeaseError(f"{self.folder.url}: lease epoch {self.epoch} has ended, the run now belongs to {now}.")


class Lease:
    """The driver's hold on a run; a context manager that keeps the heartbeat going and releases at the end."""

    def __init__(self, folder: Folder, holder: Holder, interval: float) -> None:
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
        # If the storage is away just now, the next driver finds this one gone, or silent.
        with suppress(StorageError, LeaseError):
            self._renew(released=True)

    def _beat(self, interval: float) -> None:
        while not self._stop.wait(interval):
            try:
                if not self._renew():
                    return  # Taken over: the next fence check says so where it matters.
            except StorageError:
                continue  # The storage is away for the moment; whoever publishes reports it.
            except LeaseError:
                return  # Damaged: every publish finds it so.

    def _renew(self, *, released: bool = False) -> bool:
        data = _read(self._folder)
        # An earlier renewal may have been stored although its answer was an error, so what is stored decides.
        stored = None if data is None else _decode(self._folder, data)
        if stored is None or not stored.is_same_driver(self._holder):
            return False
        renewed = replace(self._holder, heartbeat=time.time(), released=released)
        return self._folder.compare_and_swap(LEASE, data, renewed.encode())


def read_holder(folder: Folder) -> Holder | None:
    """Current content of ``lease.json``, or None where no driver ever was."""
    data = _read(folder)
    return None if data is None else _decode(folder, data)


def acquire(
    folder: Folder, *, timeout: float, say: Callable[[str], None], after_epoch: int = 0, mend: bool = False
) -> Lease:
    """Take the run's lease, with an epoch above ``after_epoch`` and above that of the last holder.

    A holder on this host whose process is gone is replaced at once; one on another host after it gave no sign of
    life for ``timeout`` seconds, which ``say`` reports. No clocks are compared: the taker watches the lease that
    long. Raises LeaseError if the holder is alive, or if the lease is damaged and ``mend`` does not replace it.
    """
    watched: bytes | None = None
    until = 0.0
    while True:
        data = _read(folder)
        current = None if data is None else _decode(folder, data, mend=mend)
        if current is None or current.has_ended() or (data == watched and time.monotonic() > until):
            me = psutil.Process()
            holder = Holder(
                epoch=1 + max(after_epoch, 0 if current is None else current.epoch),
                host=socket.gethostname(),
                pid_space=_pid_space(),
                pid=me.pid,
                started=me.create_time(),
                heartbeat=time.time(),
            )
            if folder.compare_and_swap(LEASE, data, holder.encode()):
                return Lease(folder, holder, interval=timeout / BEATS)
            continue
        if current.is_local() or watched not in (None, data):
            raise LeaseError(
                f"{folder.url}: the run is being written by {current.where}. Wait for it, stop it, or use another run."
            )
        if watched is None:
            say(f"{folder.url}: last written by {current.where}; waiting {timeout:.0f} s for a sign of life.")
            watched, until = data, time.monotonic() + timeout
        time.sleep(min(1.0, timeout / 10))


def _read(folder: Folder) -> bytes | None:
    try:
        return folder.get(LEASE)
    except FileNotFoundError:
        return None


def _decode(folder: Folder, data: bytes, *, mend: bool = False) -> Holder | None:
    try:
        return Holder(**unseal(data, f"{folder.url}/{LEASE}"))
    except (IntegrityError, TypeError) as error:
        if mend:
            return None
        raise LeaseError(f"{error} If no driver is running, `personaspace store repair` replaces it.") from error


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
