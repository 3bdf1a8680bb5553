"""A unit's coordinates: written by the driver, last of all, once every layer of the unit is committed."""

from collections.abc import Mapping, Sequence

from personaspace.cluster.job import Job
from personaspace.store.commit import commit
from personaspace.store.coordinates import unit_coordinates, unit_span_coordinates
from personaspace.store.lease import Fence
from personaspace.store.records import (
    COORDINATES_RECORD,
    ROLLOUTS,
    SPAN_COORDINATES_RECORD,
    Record,
    Slot,
    committed_slots,
    read_record,
    read_slots,
)
from personaspace.store.rollouts import Span


def commit_coordinates(
    job: Job, fence: Fence, unit: int, tokens: Mapping[int, int], spans: Mapping[int, Sequence[Span]]
) -> dict[int, str]:
    """Commit the coordinates of a unit whose shards all have records; returns its dropped rows with reasons.

    ``tokens`` is the response length of each row, ``spans`` those that have rows of their own. A row is dropped if
    any of its shards' records says so. Where the unit has coordinates already (layers were added, or a shard was
    repaired) that say less, the next generation says it all.
    """
    committed = committed_slots(job.folder, unit)
    arrays = {spec.record for spec in job.manifest.arrays}
    vouching = {slot: n for slot, n in committed.items() if slot[0] in arrays or slot[0] == ROLLOUTS}
    records = read_slots(job.folder, vouching)
    source = records.pop((ROLLOUTS, unit, 0)).objects[0].sha256
    dropped = {row: reason for record in records.values() for row, reason in record.dropped.items()}
    covers = tuple(sorted(f"{array}.{group:03d}" for array, _, group in records))
    if job.parts:
        kept = {row: spans[row] for row in job.layout.unit_row_range(unit) if row not in dropped}
        objects = unit_span_coordinates(job.manifest, unit, kept)
        _commit(job, fence, (SPAN_COORDINATES_RECORD, unit, 0), committed, objects, dropped, covers, source)
    objects = unit_coordinates(job.manifest, unit, job.rows, dropped=dropped, tokens=tokens)
    _commit(job, fence, (COORDINATES_RECORD, unit, 0), committed, objects, dropped, covers, source)
    return dropped


def _commit(
    job: Job,
    fence: Fence,
    slot: Slot,
    committed: Mapping[Slot, int],
    objects: Mapping[str, bytes],
    dropped: Mapping[int, str],
    covers: tuple[str, ...],
    source: str,
) -> Record:
    generation = job.redo.get(slot, 0)
    newest = committed.get(slot, -1)
    if newest >= generation:
        existing = read_record(job.folder, slot, newest)
        if (existing.dropped, existing.covers, existing.source) == (dropped, covers, source):
            return existing
        generation = newest + 1
    return commit(
        fence,
        slot,
        objects,
        rows=job.layout.unit_row_range(slot[1]),
        dropped=dropped,
        source=source,
        covers=covers,
        generation=generation,
    )
