"""One killed run at a time: begin, kill, take stock, resume, and compare with an undisturbed run."""

import os
import random
import signal
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from personaspace.store.index import INDEX
from personaspace.store.layout import ZARR_GROUP, Layout
from personaspace.store.lease import LEASE, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, read_manifest
from personaspace.store.objects import SCRATCH, Folder
from personaspace.store.records import ROLLOUTS, committed_slots, describe, read_slots, record_key
from personaspace.store.removal import collect_garbage, garbage
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.store.kill_run import DRIVER, Crash, drive, records_of
from tests.store.observer import Observer
from tests.store.storages import PROCESSES, contents, fresh_s3, settle

PATIENCE = 60.0
"""Seconds that a run of one second may take."""
LAYOUTS = {
    "local": Layout(segments=(45,), layers=8, hidden=16, unit_rows=4, layer_group=2),
    "s3": Layout(segments=(23,), layers=8, hidden=16, unit_rows=4, layer_group=2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one killed run came to."""

    storage: str
    writers: int
    aim: str
    """`uniform`, or which process was killed before which of its records."""
    fell: str
    """What the run was doing: `creating`, `rollouts`, `shards`, or `ended` where the kill came too late."""
    kills: int
    records: int
    """Records when all were dead, after the first kill."""
    hit: bool
    """Aimed, and the object without its record was there."""
    orphans: int
    """Objects without a record after the last kill; a unit's coordinates are seven."""
    leftovers: int
    """Unfinished files then."""
    collected: int
    """Of both, deleted by gc before the resume."""
    adopted: int
    """Orphans that the resume recorded as they were."""
    torn: int
    """Records whose object was missing or another after a kill: must be 0."""
    unreported: int
    """Orphans and leftovers that `verify` did not name, or that it named wrongly: must be 0."""
    half_written: int
    """Second copies of run.json, and indexes, that were half replaced: the resume writes them again."""
    changed: int
    """Records of the killed session that the resume changed: must be 0."""
    different: int
    """Objects that are not those of an undisturbed run: must be 0."""
    problems: int
    """What `verify` finds in the end: must be 0."""
    looks: int
    """How often the reader read."""
    partial: int
    """How often it saw a run that was partly there."""
    faults: tuple[str, ...]
    """What the reader met that it should not: must be empty."""

    @property
    def kind(self) -> str:
        return "uniform" if self.aim == "uniform" else "aimed"

    @property
    def failed(self) -> bool:
        return any((self.torn, self.unreported, self.changed, self.different, self.problems, self.faults))


@dataclass(slots=True)
class Inventory:
    """What lies in a folder whose writers are all dead."""

    records: dict[str, bytes]
    orphans: set[str]
    leftovers: set[str]
    torn: int
    unreported: int
    half_written: int


class Laboratory:
    """One kind of storage: where fresh runs go, how long one takes, and what it holds in the end."""

    def __init__(self, storage: str, scratch: Path, chance: random.Random, calibrations: int = 3) -> None:
        self.storage, self._scratch, self._chance = storage, scratch, chance
        self.layout = LAYOUTS[storage]
        self.seconds = {
            writers: statistics.median(self._calibrate(writers) for _ in range(calibrations)) for writers in range(1, 5)
        }
        folder = self._fresh()
        self._finish(folder, 1)
        self.expected = _lasting(folder)

    def trial(self, number: int, *, aimed: bool) -> Trial:
        """Begin a run, kill it once or twice, and finish it."""
        writers = self._chance.randint(1, 4)
        crash = self._aim(writers) if aimed else None
        folder = self._fresh()
        with self._watched(folder) as observer:
            fell = self._kill(folder, writers, crash)
            first = inventory = _take_inventory(folder)
            torn, unreported, kills = inventory.torn, inventory.unreported, 1
            if number % 4 == 0:
                self._kill(folder, self._chance.randint(1, 4), None)
                inventory = _take_inventory(folder)
                torn, unreported, kills = torn + inventory.torn, unreported + inventory.unreported, 2
            collected = _collect(folder) if number % 5 == 0 else 0
            self._finish(folder, self._chance.randint(1, 4))
            time.sleep(0.05)  # The reader sees the end, too.
        lasting, ended = _lasting(folder), _take_inventory(folder)
        known = {**first.records, **inventory.records}
        records = read_slots(folder, committed_slots(folder))
        return Trial(
            storage=self.storage,
            writers=writers,
            aim=f"{'driver' if crash.process == DRIVER else 'writer'} before record {crash.record}"
            if crash
            else "uniform",
            fell=fell,
            kills=kills,
            records=len(first.records),
            hit=crash is not None and len(first.orphans) > 0,
            orphans=len(inventory.orphans),
            leftovers=len(inventory.leftovers),
            collected=collected,
            adopted=sum(record.adopted for record in records.values()),
            torn=torn + ended.torn,
            unreported=unreported,
            half_written=inventory.half_written,
            changed=sum(ended.records.get(key) != data for key, data in known.items()),
            different=sum(lasting.get(key) != self.expected.get(key) for key in {*lasting, *self.expected}),
            problems=len(verify(folder).problems),
            **observer,
        )

    def _fresh(self) -> Folder:
        return LocalFolder(self._scratch / uuid.uuid4().hex / "run") if self.storage == "local" else fresh_s3()

    def _aim(self, writers: int) -> Crash:
        process = self._chance.randrange(DRIVER, writers)
        return Crash(process=process, record=self._chance.randint(1, records_of(self.layout, process, writers)))

    @contextmanager
    def _driver(self, folder: Folder, writers: int, crash: Crash | None) -> Iterator[tuple[Any, Connection]]:
        """A driver and its writers, ready to begin; killed at the end of the block, if they are still there."""
        ours, theirs = PROCESSES.Pipe(duplex=False)
        arguments = (dict(os.environ), folder, self.layout, writers, theirs, crash)
        process = PROCESSES.Process(target=_drive, args=arguments)
        process.start()
        theirs.close()
        assert ours.recv() == "ready"
        try:
            yield process, ours
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def _kill(self, folder: Folder, writers: int, crash: Crash | None) -> str:
        """Kill a run, and say what it was doing."""
        with self._driver(folder, writers, crash) as (process, answers):
            if crash is None:
                begin = time.monotonic()
                if answers.poll(self._chance.uniform(0, self.seconds[writers])):
                    # The machine is less busy than it was when this was measured.
                    self.seconds[writers] = (self.seconds[writers] + time.monotonic() - begin) / 2
                else:
                    self.seconds[writers] *= 1.02
            else:
                process.join(PATIENCE)
                assert process.exitcode == -signal.SIGKILL, f"{crash} never came: {process.exitcode}"
            said = _said(answers)
        if said is not None:
            assert said == "done", said
            return "ended"
        if read_manifest(folder) is None:
            return "creating"
        return "shards" if any(array == RESID_POST_MEAN for array, _, _ in committed_slots(folder)) else "rollouts"

    def _finish(self, folder: Folder, writers: int) -> None:
        with self._driver(folder, writers, None) as (process, answers):
            assert answers.poll(PATIENCE), "the run hangs"
            assert (said := _said(answers)) == "done", said
            process.join()

    def _calibrate(self, writers: int) -> float:
        folder = self._fresh()
        with self._watched(folder):
            begin = time.monotonic()
            self._finish(folder, writers)
            return time.monotonic() - begin

    @contextmanager
    def _watched(self, folder: Folder) -> Iterator[dict[str, Any]]:
        """A reader at work during the block; its answer is there at the end."""
        ours, theirs = PROCESSES.Pipe()
        found: dict[str, Any] = {}
        units = 3 if self.storage == "local" else 1
        arguments = (dict(os.environ), Observer(folder, self.layout, units), theirs)
        process = PROCESSES.Process(target=_watch, args=arguments)
        process.start()
        try:
            yield found
        finally:
            ours.send("stop")
            found |= ours.recv()
            process.join()


def _drive(environment: dict[str, str], *arguments: Any) -> None:
    settle(environment)
    drive(*arguments)


def _watch(environment: dict[str, str], observer: Observer, control: Connection) -> None:
    settle(environment)
    observer.watch(control.poll)
    control.send({"looks": observer.looks, "partial": observer.partial, "faults": tuple(observer.faults)})


def _said(answers: Connection) -> str | None:
    try:
        return str(answers.recv()) if answers.poll() else None
    except EOFError:
        return None


def _lasting(folder: Folder) -> dict[str, bytes]:
    """All objects that two runs have in common."""
    return contents(folder, but=(MANIFEST, MANIFEST_COPY, LEASE, "commits/"))


def _take_inventory(folder: Folder) -> Inventory:
    slots = committed_slots(folder)
    found = read_slots(folder, slots)
    recorded = {stored.key: stored for record in found.values() for stored in record.objects}
    entries = [entry.key for entry in folder.list()]
    torn = sum(key not in entries or describe(key, folder.get(key)) != stored for key, stored in recorded.items())
    manifest = read_manifest(folder)
    metadata = {stored.key for stored in manifest.metadata} if manifest else set()
    data = {
        key for key in entries if key.startswith((f"{ROLLOUTS}/", f"{ZARR_GROUP}/")) and not key.endswith("zarr.json")
    }
    orphans = data - recorded.keys() - metadata if manifest else set()
    leftovers = {key for key in entries if key.startswith(f"{SCRATCH}/")}
    unreported = half_written = 0
    if manifest is not None:
        named = {problem.key: problem.kind for problem in verify(folder).problems}
        # A kill between run.json and its copy, or between the index and its head, leaves these two behind.
        wrong = {**dict.fromkeys(orphans, "orphan"), **dict.fromkeys(leftovers, "leftover")}
        excused = {MANIFEST_COPY, INDEX}
        half_written = len(named.keys() & excused)
        unreported = sum(named.get(key) != wrong.get(key) for key in {*named, *wrong} - excused)
    return Inventory(
        records={record_key(*item): folder.get(record_key(*item)) for item in slots.items()},
        orphans=orphans,
        leftovers=leftovers,
        torn=torn,
        unreported=unreported,
        half_written=half_written,
    )


def _collect(folder: Folder) -> int:
    """What `personaspace store gc` does; nothing where there is no run yet."""
    if read_manifest(folder) is None:
        return 0
    with acquire(folder, timeout=60, say=print) as lease:
        found = garbage(folder, verify(folder, own_epoch=lease.epoch))
        collect_garbage(lease.fence, found)
    return len(found)
