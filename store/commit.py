"""The commit protocol: publish whole objects first, then the record that makes them count.

Readers trust only records. A crash between publish and record leaves objects without a record; the next
writer validates and adopts them, or replaces them. Work that remains = plan minus records.
"""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.lease import Fence
from personaspace.store.objects import Folder
from personaspace.store.sealed import seal, unseal

COMMITS = "commits"
ROLLOUTS = "rollouts"
COORDINATES_RECORD = "coordinates"
READ_THREADS = 16
"""Requests at a time where many small objects are read: an object store answers each in some 20 ms."""

Slot = tuple[str, int, int]
"""What a record commits: (array, unit, group). Arrays without layer groups use group 0."""

Inspect = Callable[[bytes], Mapping[int, str]]
"""Decodes found bytes and returns their dropped rows with reasons; raises IntegrityError to refuse them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """One published object, as its record knows it."""

    key: str
    bytes: int
    sha256: str
    """Of the whole object, in hex. No CRC-32C: over bytes that end in their own it is the same for any content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One committed piece: a shard, a unit's coordinates, its rollouts, or its scores."""

    array: str
    unit: int
    group: int = 0
    generation: int = 0
    """The highest one counts; a repair writes the next."""
    rows: tuple[int, int]
    """First row and end of the unit on the rollout axis, without padding."""
    objects: tuple[StoredObject, ...]
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Row -> reason, for rows of the unit that must not be used."""
    source: str | None = None
    """SHA-256 of the unit's rollouts that this was made from; None for the rollouts themselves."""
    covers: tuple[str, ...] = ()
    """For coordinates: the records, as `array.group`, that were complete and vouch for the unit's status."""
    writer: str
    epoch: int
    """Lease epoch under which it was written."""
    adopted: bool = False
    """The objects were found without a record and validated."""
    committed: float
    """Unix seconds."""

    @property
    def slot(self) -> Slot:
        return (self.array, self.unit, self.group)

    @property
    def key(self) -> str:
        return record_key(self.slot, self.generation)

    def encode(self) -> bytes:
        return seal(asdict(self))

    @classmethod
    def decode(cls, data: bytes, where: str) -> "Record":
        """Raises IntegrityError if the bytes are not a whole record."""
        raw = unseal(data, where)
        try:
            raw["rows"] = tuple(raw["rows"])
            raw["covers"] = tuple(raw["covers"])
            raw["objects"] = tuple(StoredObject(**stored) for stored in raw["objects"])
            raw["dropped"] = {int(row): reason for row, reason in raw["dropped"].items()}
            return cls(**raw)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{where}: not a record ({error!r}).") from error


def record_key(slot: Slot, generation: int) -> str:
    array, unit, group = slot
    return f"{COMMITS}/{unit:06d}/{array}.{group:03d}.{generation:03d}.json"


def parse_record_key(key: str) -> tuple[Slot, int] | None:
    """Slot and generation from a record's key; None for another file, such as the .nfs ones of network storage."""
    parts = key.split("/")
    fields = parts[-1].rsplit(".", 3)
    if (
        len(parts) != 3
        or parts[0] != COMMITS
        or len(fields) != 4
        or fields[3] != "json"
        or not all(text.isdigit() for text in (parts[1], fields[1], fields[2]))
    ):
        return None
    return (fields[0], int(parts[1]), int(fields[1])), int(fields[2])


def committed_slots(folder: Folder, unit: int | None = None) -> dict[Slot, int]:
    """Slot -> highest committed generation, from one listing: of the whole run, or of one unit."""
    highest: dict[Slot, int] = {}
    for entry in folder.list(COMMITS if unit is None else f"{COMMITS}/{unit:06d}"):
        parsed = parse_record_key(entry.key)
        if parsed is not None:
            slot, generation = parsed
            highest[slot] = max(generation, highest.get(slot, 0))
    return highest


def read_record(folder: Folder, slot: Slot, generation: int) -> Record:
    """One record. Raises FileNotFoundError, or IntegrityError if it is damaged or another slot's."""
    key = record_key(slot, generation)
    record = Record.decode(folder.get(key), f"{folder.url}/{key}")
    if record.key != key:
        raise IntegrityError(f"{folder.url}/{key}: holds the record {record.key}.")
    return record


def read_records(folder: Folder, array: str, units: Iterable[int] | None = None) -> dict[Slot, Record]:
    """Slot -> its record of the highest generation, for one array: of the whole run, or of some units.

    Raises IntegrityError for a damaged record.
    """
    listings = [committed_slots(folder)] if units is None else [committed_slots(folder, unit) for unit in units]
    wanted = {slot: number for listing in listings for slot, number in listing.items() if slot[0] == array}
    return read_slots(folder, wanted)


def read_slots(folder: Folder, slots: Mapping[Slot, int]) -> dict[Slot, Record]:
    """Slot -> its record of the given generation. Raises IntegrityError for a damaged record."""
    with ThreadPoolExecutor(READ_THREADS) as threads:
        records = threads.map(lambda item: read_record(folder, *item), slots.items())
        return dict(zip(slots, records, strict=True))


def commit(
    fence: Fence,
    slot: Slot,
    objects: Mapping[str, bytes],
    *,
    rows: range,
    dropped: Mapping[int, str],
    source: str | None = None,
    covers: tuple[str, ...] = (),
    generation: int = 0,
    inspect: Inspect | None = None,
) -> Record:
    """Publish ``objects`` (key -> bytes) and record them under ``slot``.

    An object that is already there without a record is kept if ``inspect`` accepts it (the first one wins) and
    replaced otherwise; without ``inspect``, and in generations above 0, any difference is replaced. If another
    writer recorded the slot meanwhile, its record is returned. Raises LeaseError when fenced out.
    """
    fence.check()
    try:
        return read_record(fence.folder, slot, generation)
    except FileNotFoundError:
        pass  # The usual case: nobody has committed the slot.
    stored = []
    adopted = False
    for key, data in objects.items():
        kept, reasons = publish(fence, key, data, inspect if generation == 0 else None)
        if reasons is not None:
            dropped, adopted = reasons, True
        stored.append(describe(key, kept))
    return _publish_record(
        fence,
        slot,
        stored,
        rows=rows,
        dropped=dropped,
        source=source,
        covers=covers,
        generation=generation,
        adopted=adopted,
    )


def adopt(
    fence: Fence, slot: Slot, key: str, *, rows: range, inspect: Inspect, source: str | None = None, generation: int = 0
) -> Record | None:
    """Record an object that is there without a record, if ``inspect`` accepts it; otherwise None."""
    try:
        data = fence.folder.get(key)
    except FileNotFoundError:
        return None
    dropped = _inspect(inspect, data)
    if dropped is None:
        return None
    return _publish_record(
        fence,
        slot,
        [describe(key, data)],
        rows=rows,
        dropped=dropped,
        source=source,
        generation=generation,
        adopted=True,
    )


def describe(key: str, data: bytes) -> StoredObject:
    """What a record says of an object."""
    return StoredObject(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_object(folder: Folder, stored: StoredObject) -> bytes:
    """Bytes of a recorded object. Raises IntegrityError if it is missing or not what the record says."""
    try:
        data = folder.get(stored.key)
    except FileNotFoundError as error:
        raise IntegrityError(f"{folder.url}/{stored.key}: is recorded, but missing.") from error
    if describe(stored.key, data) != stored:
        raise IntegrityError(f"{folder.url}/{stored.key}: {len(data)} bytes that differ from their record.")
    return data


def publish(
    fence: Fence, key: str, data: bytes, inspect: Inspect | None = None
) -> tuple[bytes, Mapping[int, str] | None]:
    """Put ``data`` in place, or keep what ``inspect`` accepts there.

    Returns the bytes that now count, and if they were found, their dropped rows. Raises LeaseError when fenced out.
    """
    while True:
        fence.check()
        if fence.folder.put_new(key, data):
            return data, None
        try:
            existing = fence.folder.get(key)
        except FileNotFoundError:
            continue  # Deleted meanwhile.
        if existing == data:
            return data, None
        reasons = None if inspect is None else _inspect(inspect, existing)
        if reasons is not None:
            return existing, reasons
        fence.check()
        # Only what was seen is replaced: a writer that is paused right here can't undo its successor's work.
        if fence.folder.compare_and_swap(key, existing, data):
            return data, None


def _inspect(inspect: Inspect, data: bytes) -> Mapping[int, str] | None:
    try:
        return inspect(data)
    except IntegrityError:
        return None


def _publish_record(
    fence: Fence,
    slot: Slot,
    stored: list[StoredObject],
    *,
    rows: range,
    dropped: Mapping[int, str],
    source: str | None,
    generation: int,
    adopted: bool,
    covers: tuple[str, ...] = (),
) -> Record:
    array, unit, group = slot
    record = Record(
        array=array,
        unit=unit,
        group=group,
        generation=generation,
        rows=(rows.start, rows.stop),
        objects=tuple(stored),
        dropped=dict(dropped),
        source=source,
        covers=covers,
        writer=f"{socket.gethostname()}:{os.getpid()}",
        epoch=fence.epoch,
        adopted=adopted,
        committed=time.time(),
    )
    fence.check()
    if fence.folder.put_new(record.key, record.encode()):
        _withdraw_if_late(fence, record)
        return record
    existing = read_record(fence.folder, slot, generation)
    if existing.objects == record.objects:
        return existing
    # A writer of an earlier driver slept through this publish and woke just before this record: what it vouches for
    # is no longer there, and the next generation says what is.
    return _publish_record(
        fence,
        slot,
        stored,
        rows=rows,
        dropped=dropped,
        source=source,
        covers=covers,
        generation=generation + 1,
        adopted=adopted,
    )


def _withdraw_if_late(fence: Fence, record: Record) -> None:
    """Take back a record that its writer put after its time, if what it vouches for is no longer there."""
    try:
        fence.check()
    except LeaseError:
        for stored in record.objects:
            try:
                read_object(fence.folder, stored)
            except IntegrityError:
                fence.folder.delete(record.key)
        raise
