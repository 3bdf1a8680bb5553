"""A writer that sleeps at any step of a commit, and the scenes that it sleeps in."""

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from personaspace.store.commit import commit
from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.lease import LEASE, Fence, acquire, read_holder
from personaspace.store.objects import Folder
from personaspace.store.records import Record, Slot, committed_slots, describe, read_record, record_key
from tests.store.hooks import hooked
from tests.store.storages import contents

SLOT: Slot = ("resid_post_mean", 0, 0)
KEY = "activations.zarr/resid_post_mean/c/0/0/0"


def whole(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


def inspect(data: bytes) -> Mapping[int, str]:
    if data != whole(data[32:]):
        raise IntegrityError("damaged")
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What lies at the slot when two writers come to commit it, and how they do."""

    found: bytes | None = None
    """Bytes without a record."""
    inspects: bool = True
    generation: int = 0

    def prepare(self, fence: Fence) -> None:
        if self.generation:
            commit(fence, SLOT, {KEY: b"damaged later"}, rows=range(2), dropped={})
        elif self.found is not None:
            fence.folder.put_new(KEY, self.found)

    def commit(self, fence: Fence, data: bytes) -> Record:
        return commit(
            fence,
            SLOT,
            {KEY: data},
            rows=range(2),
            dropped={},
            inspect=inspect if self.inspects else None,
            generation=self.generation,
        )


SCENES = {
    "nothing there": Scene(),
    "sound orphan": Scene(found=whole(b"orphan")),
    "damaged orphan": Scene(found=b"damaged"),
    "no inspection": Scene(inspects=False),
    "orphan, no inspection": Scene(found=b"orphan", inspects=False),
    "repair": Scene(generation=1),
}


def first_driver(folder: Folder) -> Fence:
    return acquire(folder, timeout=60, say=pytest.fail).fence


def take_over(folder: Folder) -> Fence:
    """The next driver's fence; the holder counts as one that ended, whatever it still does."""
    holder = read_holder(folder)
    assert holder is not None
    folder.replace(LEASE, replace(holder, released=True).encode())
    return acquire(folder, timeout=60, say=pytest.fail).fence


def outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except LeaseError:
        return "fenced out"


def check(folder: Folder, scene: Scene, late: Any, record: Record) -> None:
    """The newest record says what the object is; who came late got that, or an error.

    A record that came late enough to precede the next driver's own makes that one take the next generation.
    """
    newest = committed_slots(folder)[SLOT]
    assert newest in (scene.generation, scene.generation + 1)
    stored = read_record(folder, SLOT, newest)
    assert record == stored
    assert late in ("fenced out", stored)
    assert newest == scene.generation or late == "fenced out"
    assert stored.objects == (describe(KEY, folder.get(KEY)),)
    records = {record_key(SLOT, generation) for generation in range(newest + 1)}
    assert contents(folder, but=(LEASE,)).keys() == {KEY, *records}


@dataclass(slots=True)
class Sleeper:
    """The first writer, in a thread: sleeps before its operation ``sleep`` until ``wake`` is called."""

    folder: Folder
    work: Callable[[Fence], Any]
    sleep: int | tuple[str, str] | None
    """Its number, or which one it is."""
    asleep_before: tuple[str, str] | None = None
    """The operation that it sleeps before; None once it is through."""
    late: Any = None
    """What it came to."""
    _asleep: threading.Event = field(default_factory=threading.Event)
    _awake: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        fence = first_driver(self.folder) if read_holder(self.folder) is None else Fence(self.folder, 1)
        count = itertools.count(1)

        def before(operation: str, key: str) -> None:
            if self.sleep in (next(count), (operation, key)):
                self.asleep_before = (operation, key)
                self._asleep.set()
                assert self._awake.wait(30)
                self._awake.clear()

        def run() -> None:
            self.late = outcome(lambda: self.work(Fence(hooked(self.folder, before), fence.epoch)))
            self.asleep_before = None
            self._asleep.set()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert self._asleep.wait(30)

    def wake(self, until: tuple[str, str] | None = None) -> Any:
        """Wake it, until its next operation ``until`` or its end; what it came to."""
        if self.asleep_before is not None:
            self.sleep = until
            self._asleep.clear()
            self._awake.set()
            assert self._asleep.wait(30)
        return self.late
