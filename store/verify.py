"""Verification: every byte of a run against its checksums, and every object against what should be there."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from personaspace.store.copying import COPYING
from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.expected import KNOWN, decoders, orphan_slot
from personaspace.store.index import INDEX, TABLE, is_whole
from personaspace.store.judging import is_judging_key
from personaspace.store.lease import LEASE, read_holder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, Manifest, read_manifest, require_manifest
from personaspace.store.objects import SCRATCH, Folder
from personaspace.store.records import (
    READ_THREADS,
    ROLLOUTS,
    Record,
    Slot,
    StoredObject,
    committed_slots,
    parse_record_key,
    read_object,
    read_record,
    record_key,
)
from personaspace.store.scores import SCORES
from personaspace.store.sessions import is_session_key, read_session, session_epochs, session_key
from personaspace.store.space import LATEST, SPACE, space_objects

Kind = Literal["damaged", "missing", "stale", "orphan", "leftover", "foreign"]
HARMFUL = ("damaged", "missing", "stale")
"""Kinds that cost data, or protection, until they are repaired. The others only take space."""
DIFFERS = "differs from its checksum"


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    kind: Kind
    """`damaged`: bytes differ from their checksum; `missing`: recorded or needed, but not there; `stale`: made from
    rollouts that have been made again; `orphan`: an object without a record, as a crash leaves it; `leftover`: an
    unfinished or superseded file; `foreign`: nothing of ours."""
    key: str
    detail: str
    slot: Slot | None = None
    """What has to be made again, if anything."""
    generation: int = 0
    """Of the slot's newest record that was found, damaged or not."""
    record_only: bool = False
    """The record is at fault; its objects may be whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` found."""

    manifest: Manifest
    problems: tuple[Problem, ...]
    objects: int
    """Objects whose bytes were compared with a checksum."""
    bytes: int
    writing: bool
    """A driver was at work: what it has in hand is no orphan."""

    @property
    def harmful(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.kind in HARMFUL]

    def rows(self) -> list[int]:
        """Rows of the rollout axis that have lost something, sorted."""
        units = {problem.slot[1] for problem in self.harmful if problem.slot is not None}
        return [row for unit in sorted(units) for row in self.manifest.layout.unit_row_range(unit)]


@dataclass(slots=True)
class _Check:
    """A verification on its way."""

    folder: Folder
    progress: Callable[[int, int], None]
    problems: list[Problem] = field(default_factory=list)
    expected: set[str] = field(default_factory=set)
    bytes: int = 0
    done: int = 0

    def compare(self, objects: Iterable[tuple[StoredObject, Slot | None, int]]) -> None:
        """Compare objects (with the slot and generation that they belong to) with their checksums."""
        wanted = list(objects)
        self.expected |= {stored.key for stored, _, _ in wanted}
        with ThreadPoolExecutor(READ_THREADS) as threads:
            for (stored, slot, generation), fault in zip(
                wanted, threads.map(lambda item: self._fault(item[0]), wanted), strict=True
            ):
                self.done += 1
                self.bytes += stored.bytes
                self.progress(self.done, self.bytes)
                if fault is not None:
                    kind, detail = fault
                    self.add(kind, stored.key, detail, slot, generation)

    def add(self, kind: Kind, key: str, detail: str, slot: Slot | None = None, generation: int = 0) -> None:
        self.problems.append(Problem(kind=kind, key=key, detail=detail, slot=slot, generation=generation))

    def _fault(self, stored: StoredObject) -> tuple[Kind, str] | None:
        try:
            read_object(self.folder, stored)
        except IntegrityError:
            present = self.folder.exists(stored.key)
            return ("damaged", DIFFERS) if present else ("missing", "is recorded, but not there")
        return None


def verify(
    folder: Folder,
    progress: Callable[[int, int], None] = lambda objects, size: None,
    *,
    own_epoch: int | None = None,
) -> Verification:
    """Check a whole run; reads every byte of it, and writes nothing.

    ``progress`` is called with the objects and bytes checked so far. ``own_epoch`` is that of the lease which the
    caller holds, if it does: any other live holder's work in hand is not judged. Raises InputError if there is no
    run, and IntegrityError if both copies of its manifest are damaged.
    """
    check = _Check(folder, progress)
    manifest = _manifest(check)
    writing = _lease(check, manifest, own_epoch)
    # Objects are listed before records: what appears in between has a record, or is no orphan of this listing.
    entries = [entry.key for entry in folder.list()]
    records = _records(check)
    check.compare((stored, None, 0) for stored in (*manifest.plan, *manifest.metadata))
    check.compare((stored.copy, None, 0) for stored in manifest.plan)
    check.compare((entry, slot, record.generation) for slot, record in records.items() for entry in record.objects)
    _unrecorded(check, manifest)
    _relations(check, records)
    _derived(check, entries)
    _unexpected(check, manifest, entries, records, writing)
    return Verification(
        manifest=manifest, problems=tuple(check.problems), objects=check.done, bytes=check.bytes, writing=writing
    )


def _manifest(check: _Check) -> Manifest:
    """The manifest, from whichever copy is sound."""
    found: dict[str, Manifest | None] = {}
    for key in (MANIFEST, MANIFEST_COPY):
        check.expected.add(key)
        try:
            found[key] = read_manifest(check.folder, key)
        except IntegrityError:
            check.add("damaged", key, DIFFERS)
        else:
            if found[key] is None:
                check.add("missing", key, "is not there")
    sound = [manifest for manifest in found.values() if manifest is not None]
    if not sound:
        if all(problem.kind == "missing" for problem in check.problems):
            return require_manifest(check.folder)  # Says that there is no run.
        raise IntegrityError(f"{check.folder.url}: both copies of run.json are damaged; restore the run from a copy.")
    if len(sound) == 2 and sound[0] != sound[1]:
        check.add("damaged", MANIFEST_COPY, "differs from run.json: its last writer was interrupted")
    return sound[0]


def _lease(check: _Check, manifest: Manifest, own_epoch: int | None) -> bool:
    """Check the lease; whether another driver is at work."""
    check.expected.add(LEASE)
    try:
        holder = read_holder(check.folder)
    except LeaseError:
        check.add("damaged", LEASE, DIFFERS)
        return False
    if holder is None:
        if manifest.sessions:
            check.add("missing", LEASE, "is not there; earlier drivers are no longer fenced out")
        return False
    return holder.epoch != own_epoch and not holder.has_ended()


def _records(check: _Check) -> dict[Slot, Record]:
    """Slot -> its newest sound record; damaged ones are noted."""
    newest = committed_slots(check.folder)
    keys = [entry.key for entry in check.folder.list("commits")]
    parsed = [(key, place) for key in keys if (place := parse_record_key(key)) is not None]
    check.expected |= {key for key, _ in parsed}

    def read(place: tuple[Slot, int]) -> Record | None:
        try:
            return read_record(check.folder, *place)
        except (IntegrityError, FileNotFoundError):
            return None

    records: dict[Slot, Record] = {}
    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = threads.map(read, [place for _, place in parsed])
        for (key, (slot, generation)), record in zip(parsed, found, strict=True):
            check.done += 1
            if record is None:
                check.problems.append(
                    Problem(
                        kind="damaged",
                        key=key,
                        detail=DIFFERS,
                        # A damaged record that a newer one has replaced costs nothing.
                        slot=slot if generation == newest[slot] else None,
                        generation=generation,
                        record_only=True,
                    )
                )
            elif generation == newest[slot]:
                records[slot] = record
    return records


def _unrecorded(check: _Check, manifest: Manifest) -> None:
    """Objects whose record is damaged must at least decode: their chunks and pages have checksums of their own."""
    damaged = {p.slot: p.generation for p in check.problems if p.record_only and p.slot is not None}
    for slot, generation in damaged.items():
        for key, decode in decoders(slot, manifest).items():
            try:
                decode(check.folder.get(key))
            except FileNotFoundError:
                check.add("missing", key, "is not there, and its record is damaged", slot, generation)
            except IntegrityError:
                check.add("damaged", key, "does not decode, and its record is damaged", slot, generation)


def _relations(check: _Check, records: Mapping[Slot, Record]) -> None:
    """Pieces that others rest on must be there, and be the ones that they were made from."""
    known = set(records) | {problem.slot for problem in check.problems if problem.slot is not None}
    needed: set[Slot] = set()
    for (array, unit, _), record in records.items():
        if array != ROLLOUTS and record.source is not None:
            needed.add((ROLLOUTS, unit, 0))
        for name in record.covers:
            covered, _, group = name.rpartition(".")
            needed.add((covered, unit, int(group)))
    for slot in sorted(needed - known):
        check.add("missing", record_key(slot, 0), "other records rest on it", slot, -1)
    for slot, record in records.items():
        rollouts = records.get((ROLLOUTS, slot[1], 0))
        if record.source is not None and rollouts is not None and record.source != rollouts.objects[0].sha256:
            detail = "was made from rollouts that have been made again"
            check.add("stale", record.objects[0].key, detail, slot, record.generation)


def _derived(check: _Check, entries: list[str]) -> None:
    """The fit and the index: both can be made again."""
    try:
        objects = space_objects(check.folder)
    except IntegrityError:
        check.add("damaged", LATEST, DIFFERS)
        objects = None
    else:
        if objects is None and any(key.startswith(f"{SPACE}/") for key in entries):
            check.add("missing", LATEST, "names the current fit; fit again")
    check.compare((stored, None, 0) for stored in objects or ())
    if {INDEX, TABLE} & set(entries) and not is_whole(check.folder):
        check.add("damaged", INDEX, "the index is damaged; readers do without it until it is made again")
    for epoch in session_epochs(entries):
        if read_session(check.folder, epoch) is None:
            check.add("leftover", session_key(epoch), "is damaged; it said how far its driver was")


def _unexpected(
    check: _Check, manifest: Manifest, entries: list[str], records: Mapping[Slot, Record], writing: bool
) -> None:
    """Whatever else lies in the folder."""
    troubled = Counter(problem.slot for problem in check.problems if problem.slot is not None)
    for key in entries:
        if key in check.expected or key in KNOWN or is_session_key(key) or is_judging_key(key):
            continue
        slot = orphan_slot(key, manifest)
        name = key.rsplit("/", 1)[-1]
        if slot is not None:
            # The objects of a slot whose record is damaged or lost are what a repair looks at first.
            if writing or slot in records or slot in troubled:
                continue
            if slot[0].startswith(f"{SCORES}."):
                check.add("missing", record_key(slot, 0), "scores are there without their record", slot, -1)
                troubled[slot] += 1
            else:
                check.add("orphan", key, "has no record; resuming the run adopts it, gc deletes it")
        elif key.startswith(f"{SCRATCH}/") or name.startswith(".nfs") or ".partial" in name:
            if not writing:
                check.add("leftover", key, "an unfinished file of a writer that is gone")
        elif key.startswith(f"{SPACE}/"):
            check.add("leftover", key, "belongs to no current fit")
        elif key == COPYING:
            check.add("leftover", key, "of a copy that was interrupted at its very end")
        elif key.startswith("plan/"):
            check.add("leftover", key, "of a growth that was never finished")
        else:
            check.add("foreign", key, "is not part of a run")
