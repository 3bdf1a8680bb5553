"""Shards that a crash left without a record: looked at, and recorded if they are what their place says."""

from collections.abc import Mapping
from functools import partial

from personaspace.cluster.job import Job
from personaspace.cluster.shards import inspect_shard
from personaspace.cluster.window import span_rows
from personaspace.store.commit import Inspect, adopt
from personaspace.store.layout import ZARR_GROUP, shard_key
from personaspace.store.lease import Fence
from personaspace.store.records import ROLLOUTS, read_records
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import ArraySpec


def adopt_orphans(job: Job, fence: Fence) -> None:
    """Record every missing shard that is there, whole, all the same."""
    done = job.committed()
    # One listing an array: an object store would take minutes to be asked for every shard.
    present = {entry.key for spec in job.manifest.arrays for entry in job.folder.list(f"{ZARR_GROUP}/{spec.path}/c")}
    specs = {spec.record: spec for spec in job.manifest.arrays}
    for unit in range(job.layout.units):
        found = [
            (specs[array], group)
            for array, group in job.missing_shards(done, unit)
            # What is to be made again has lost its record's trust.
            if (array, unit, group) not in job.redo and shard_key(specs[array].path, unit, group) in present
        ]
        if not found:
            continue
        # The rollouts' own record knows what was dropped before extraction.
        rollouts = read_records(job.folder, ROLLOUTS, [unit])[(ROLLOUTS, unit, 0)]
        used = count_spans(job, unit) if any(spec.spans for spec, _ in found) else {}
        for spec, group in found:
            adopt(
                fence,
                (spec.record, unit, group),
                shard_key(spec.path, unit, group),
                rows=job.layout.unit_row_range(unit),
                source=rollouts.objects[0].sha256,
                inspect=shard_inspection(job, spec, unit, group, rollouts.dropped, used),
            )


def count_spans(job: Job, unit: int) -> dict[int, int]:
    """Row -> places that the rollout fills in the arrays of spans."""
    return {row: len(spans) for row, spans in span_rows(job, read_rollouts(job.folder, [unit])).items()}


def shard_inspection(
    job: Job, spec: ArraySpec, unit: int, group: int, dropped: Mapping[int, str], used: Mapping[int, int]
) -> Inspect:
    """What tells a unit's own shard from any other; ``used``, of `count_spans`, counts for an array of spans only."""
    return partial(inspect_shard, job.layout, spec, job.manifest.spans_per_rollout, unit, group, dropped, used)
