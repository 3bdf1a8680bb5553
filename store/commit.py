"""The commit protocol: publish whole objects first, then the record that makes them count.

Readers trust only records. A crash between publish and record leaves objects without a record; the next
writer validates and adopts them, or replaces them. Work that remains = plan minus records.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.lease import Fence
from personaspace.store.records import Agreement, Record, Slot, StoredObject, describe, read_object, read_record

Inspect = Callable[[bytes], Mapping[int, str]]
"""Decodes found bytes and returns their dropped rows with reasons; raises IntegrityError to refuse them."""


def commit(
    fence: Fence,
    slot: Slot,
    objects: Mapping[str, bytes],
    *,
    rows: range,
    dropped: Mapping[int, str],
    source: str | None = None,
    covers: tuple[str, ...] = (),
    split: tuple[int, ...] = (),
    agreement: Agreement | None = None,
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
    record = _record(fence, slot, stored, rows=rows, dropped=dropped, source=source, generation=generation)
    return _publish_record(
        fence, replace(record, covers=covers, split=split, agreement=None if adopted else agreement, adopted=adopted)
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
    stored = [describe(key, data)]
    record = _record(fence, slot, stored, rows=rows, dropped=dropped, source=source, generation=generation)
    return _publish_record(fence, replace(record, adopted=True))


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


def _record(
    fence: Fence,
    slot: Slot,
    stored: list[StoredObject],
    *,
    rows: range,
    dropped: Mapping[int, str],
    source: str | None,
    generation: int,
) -> Record:
    array, unit, group = slot
    return Record(
        array=array,
        unit=unit,
        group=group,
        generation=generation,
        rows=(rows.start, rows.stop),
        objects=tuple(stored),
        dropped=dict(dropped),
        source=source,
        writer=f"{socket.gethostname()}:{os.getpid()}",
        epoch=fence.epoch,
        committed=time.time(),
    )


def _publish_record(fence: Fence, record: Record) -> Record:
    fence.check()
    if fence.folder.put_new(record.key, record.encode()):
        _withdraw_if_late(fence, record)
        return record
    try:
        existing: Record | None = read_record(fence.folder, record.slot, record.generation)
    except FileNotFoundError:
        existing = None  # A late writer has just withdrawn it.
    if existing is not None and existing.objects == record.objects:
        return existing
    # Otherwise a writer of an earlier driver slept through this publish and woke just before this record: what it
    # vouches for is no longer there, and the next generation says what is.
    generation = record.generation if existing is None else record.generation + 1
    return _publish_record(fence, replace(record, generation=generation, committed=time.time()))


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
