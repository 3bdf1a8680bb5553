"""Records: what is committed, by which objects, and how they are checked.

A record makes objects count. Readers trust only records; work that remains = plan minus records.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

from personaspace.store.errors import IntegrityError
from personaspace.store.objects import Folder
from personaspace.store.sealed import seal, unseal

COMMITS = "commits"
ROLLOUTS = "rollouts"
COORDINATES_RECORD = "coordinates"
SPAN_COORDINATES_RECORD = "spans.coordinates"
READ_THREADS = 16
"""Requests at a time where many small objects are read: an object store answers each in some 20 ms."""

Slot = tuple[str, int, int]
"""What a record commits: (array, unit, group). Arrays without layer groups use group 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """One published object, as its record knows it."""

    key: str
    bytes: int
    sha256: str
    """Of the whole object, in hex. No CRC-32C: over bytes that end in their own it is the same for any content."""

    @property
    def copy(self) -> "StoredObject":
        """Its second copy, of an object that is kept twice."""
        return replace(self, key=copy_key(self.key))


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How near activations that were captured while generating come to a replay, in one rollout, at worst."""

    row: int
    """Of the rollout that was run again, whole."""
    cosine: float
    """Least cosine of the two means of a layer."""
    relative: float
    """Largest difference of the two, relative to the replay's norm."""


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
    split: tuple[int, ...] = ()
    """Rows whose micro-batch ran in parts, since memory ran out: equal to a run in one part within rounding only."""
    agreement: Agreement | None = None
    """Of a shard that was captured while generating; None for one that was read in a pass of its own."""
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
            raw["split"] = tuple(raw["split"])
            raw["objects"] = tuple(StoredObject(**stored) for stored in raw["objects"])
            if raw.get("agreement") is not None:
                raw["agreement"] = Agreement(**raw["agreement"])
            raw["dropped"] = {int(row): reason for row, reason in raw["dropped"].items()}
            return cls(**raw)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{where}: not a record ({error!r}).") from error


def copy_key(key: str) -> str:
    """Key of the second copy of an object that can't be computed again."""
    stem, _, suffix = key.rpartition(".")
    return f"{stem}.copy.{suffix}"


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
    listing = folder.list(COMMITS if unit is None else f"{COMMITS}/{unit:06d}")
    return newest_generations(entry.key for entry in listing)


def newest_generations(keys: Iterable[str]) -> dict[Slot, int]:
    """Slot -> highest generation, from the records among some keys."""
    highest: dict[Slot, int] = {}
    for key in keys:
        parsed = parse_record_key(key)
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
