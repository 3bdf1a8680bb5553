"""The commit protocol: publish whole objects first, then the record that makes them count.

Readers trust only records. A crash between publish and record leaves objects without a record; the next
writer validates and adopts them, or replaces them. Work that remains = plan minus records.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from personaspace.store.errors import IntegrityError
from personaspace.store.lease import Fence
from personaspace.store.objects import LocalFolder

COMMITS = "commits"
ROLLOUTS = "rollouts"
COORDINATES_RECORD = "coordinates"

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
    """One committed piece: a shard, a unit's coordinates, or a unit's rollouts."""

    array: str
    unit: int
    group: int = 0
    generation: int = 0
    """The highest one counts; a repair writes the next."""
    rows: tuple[int, int]
    """First row and end of the unit on the rollout axis."""
    objects: tuple[StoredObject, ...]
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Row -> reason, for rows of the unit that must not be used."""
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
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Record":
        raw: dict[str, Any] = json.loads(data)
        raw["rows"] = tuple(raw["rows"])
        raw["objects"] = tuple(StoredObject(**stored) for stored in raw["objects"])
        raw["dropped"] = {int(row): reason for row, reason in raw["dropped"].items()}
        return cls(**raw)


def record_key(slot: Slot, generation: int) -> str:
    array, unit, group = slot
    return f"{COMMITS}/{unit:06d}/{array}.{group:03d}.{generation:03d}.json"


def parse_record_key(key: str) -> tuple[Slot, int]:
    """Slot and generation from a record's key: listing names is enough to know what is committed."""
    _, unit, name = key.split("/")
    array, group, generation, _ = name.rsplit(".", 3)
    return (array, int(unit), int(group)), int(generation)


def committed_slots(folder: LocalFolder, unit: int | None = None) -> dict[Slot, int]:
    """Slot -> highest committed generation, from one listing: of the whole run, or of one unit."""
    highest: dict[Slot, int] = {}
    for key in folder.list(COMMITS if unit is None else f"{COMMITS}/{unit:06d}"):
        if not key.endswith(".json"):
            continue  # Such as the .nfs files of a network file system.
        slot, generation = parse_record_key(key)
        highest[slot] = max(generation, highest.get(slot, 0))
    return highest


def read_records(folder: LocalFolder, array: str, unit: int | None = None) -> dict[Slot, Record]:
    """Slot -> its record of the highest generation, for one array: of the whole run, or of one unit."""
    committed = committed_slots(folder, unit)
    return {
        slot: Record.decode(folder.get(record_key(slot, generation)))
        for slot, generation in committed.items()
        if slot[0] == array
    }


def commit(
    fence: Fence,
    slot: Slot,
    objects: Mapping[str, bytes],
    *,
    rows: range,
    dropped: Mapping[int, str],
    generation: int = 0,
    inspect: Inspect | None = None,
) -> Record:
    """Publish ``objects`` (key -> bytes) and record them under ``slot``.

    An object that is already there without a record is kept if ``inspect`` accepts it (the first one wins) and
    replaced otherwise; without ``inspect`` any difference is replaced. Generations above 0 replace on purpose.
    If another writer recorded the slot meanwhile, its record is returned. Raises LeaseError when fenced out.
    """
    fence.check()
    try:
        return Record.decode(fence.folder.get(record_key(slot, generation)))
    except FileNotFoundError:
        pass  # The usual case: nobody has committed the slot.
    stored = []
    adopted = False
    for key, data in objects.items():
        fence.check()
        if generation == 0 and not fence.folder.put_new(key, data):
            existing = fence.folder.get(key)
            accepted = None if inspect is None or existing == data else _inspect(inspect, existing)
            if accepted is not None:
                data, dropped, adopted = existing, accepted, True
            elif existing != data:
                fence.check()
                fence.folder.replace(key, data)
        elif generation > 0:
            fence.folder.replace(key, data)
        stored.append(describe(key, data))
    return _publish_record(fence, slot, stored, rows=rows, dropped=dropped, generation=generation, adopted=adopted)


def adopt(fence: Fence, slot: Slot, key: str, *, rows: range, inspect: Inspect) -> Record | None:
    """Record an object that a crash left without a record, if it is there and ``inspect`` accepts it."""
    try:
        data = fence.folder.get(key)
    except FileNotFoundError:
        return None
    dropped = _inspect(inspect, data)
    if dropped is None:
        return None
    return _publish_record(fence, slot, [describe(key, data)], rows=rows, dropped=dropped, generation=0, adopted=True)


def describe(key: str, data: bytes) -> StoredObject:
    """What a record says of an object."""
    return StoredObject(key=key, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_object(folder: LocalFolder, stored: StoredObject) -> bytes:
    """Bytes of a recorded object. Raises IntegrityError if it is missing or not what the record says."""
    try:
        data = folder.get(stored.key)
    except FileNotFoundError as error:
        raise IntegrityError(f"{folder.path / stored.key}: is recorded, but missing.") from error
    if describe(stored.key, data) != stored:
        raise IntegrityError(f"{folder.path / stored.key}: {len(data)} bytes that differ from their record.")
    return data


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
    generation: int,
    adopted: bool,
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
        writer=f"{socket.gethostname()}:{os.getpid()}",
        epoch=fence.epoch,
        adopted=adopted,
        committed=time.time(),
    )
    fence.check()
    if fence.folder.put_new(record.key, record.encode()):
        return record
    return Record.decode(fence.folder.get(record.key))
