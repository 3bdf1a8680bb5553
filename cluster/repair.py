"""Repairing a run: what the store can't restore by itself is computed again, and committed as the next generation."""

from collections.abc import Callable, Iterable
from functools import partial

from personaspace.cluster.adoption import count_spans, shard_inspection
from personaspace.cluster.generators import inspect_rollouts
from personaspace.cluster.job import Job
from personaspace.store.commit import Inspect, adopt
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import rollouts_key, shard_key
from personaspace.store.lease import Fence
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, SPAN_COORDINATES_RECORD, Slot, read_records
from personaspace.store.verify import Problem, Verification


def slots_to_redo(job: Job, problems: Iterable[Problem]) -> dict[Slot, int]:
    """Slot -> generation in which it is to be made again, for everything that a model or the plan can make."""
    redo: dict[Slot, int] = {}
    arrays = {spec.record for spec in job.manifest.arrays}
    for problem in problems:
        if problem.slot is not None and problem.slot[0] in arrays | {
            ROLLOUTS,
            COORDINATES_RECORD,
            SPAN_COORDINATES_RECORD,
        }:
            redo[problem.slot] = max(redo.get(problem.slot, 0), problem.generation + 1)
    return redo


def adopt_whole(job: Job, fence: Fence, found: Verification, say: Callable[[str], None]) -> set[Slot]:
    """Give new records to objects that are whole and have only lost theirs; returns their slots."""
    layout = job.layout
    adopted: set[Slot] = set()
    faults: dict[Slot, list[Problem]] = {}
    for problem in found.harmful:
        if problem.slot is not None:
            faults.setdefault(problem.slot, []).append(problem)
    specs = {spec.record: spec for spec in job.manifest.arrays}
    for slot, problems in sorted(faults.items()):
        array, unit, group = slot
        if not (array == ROLLOUTS or array in specs) or not all(problem.record_only for problem in problems):
            continue
        rows, source = layout.unit_row_range(unit), None
        inspect: Inspect
        if array == ROLLOUTS:
            key, inspect = rollouts_key(unit), partial(inspect_rollouts, job.ids(unit))
        else:
            try:
                rollouts = read_records(job.folder, ROLLOUTS, [unit])[(ROLLOUTS, unit, 0)]
                used = count_spans(job, unit) if specs[array].spans else {}
                inspect = shard_inspection(job, specs[array], unit, group, rollouts.dropped, used)
            except (IntegrityError, KeyError):
                continue
            key, source = shard_key(specs[array].path, unit, group), rollouts.objects[0].sha256
        generation = max(problem.generation for problem in problems) + 1
        if adopt(fence, slot, key, rows=rows, inspect=inspect, source=source, generation=generation) is not None:
            say(f"{key}: whole, and recorded again")
            adopted.add(slot)
    return adopted
