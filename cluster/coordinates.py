"""A unit's coordinates: written by the driver, last of all, once every layer of the unit is committed."""

from collections.abc import Mapping

from personaspace.cluster.job import Job
from personaspace.store.commit import commit
from personaspace.store.coordinates import unit_coordinates
from personaspace.store.lease import Fence
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, committed_slots, read_record, read_records


def commit_coordinates(job: Job, fence: Fence, unit: int, tokens: Mapping[int, int]) -> tuple[int, int]:
    """Commit the coordinates of a unit whose shards all have records; returns its rows, and how many are dropped.

    ``tokens`` is the response length of each row. A row is dropped if any of its shards' records says so. Where the
    unit has coordinates already (layers were added, or a shard was repaired) that say less, the next generation says
    it all.
    """
    planned = job.layout.unit_row_range(unit)
    shards = read_records(job.folder, job.array.record, [unit])
    dropped = {row: reason for record in shards.values() for row, reason in record.dropped.items()}
    covers = tuple(sorted(f"{array}.{group:03d}" for array, _, group in shards))
    rollouts = read_records(job.folder, ROLLOUTS, [unit])[(ROLLOUTS, unit, 0)]
    source = rollouts.objects[0].sha256
    slot = (COORDINATES_RECORD, unit, 0)
    generation = job.redo.get(slot, 0)
    committed = committed_slots(job.folder, unit).get(slot, -1)
    if committed >= generation:
        existing = read_record(job.folder, slot, committed)
        if (existing.dropped, existing.covers, existing.source) == (dropped, covers, source):
            return len(planned), len(dropped)
        generation = committed + 1

    commit(
        fence,
        slot,
        unit_coordinates(job.manifest, unit, job.rows, dropped=dropped, tokens=tokens),
        rows=planned,
        dropped=dropped,
        source=source,
        covers=covers,
        generation=generation,
    )
    return len(planned), len(dropped)
