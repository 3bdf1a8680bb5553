"""The generate step: hands batches of units to generator actors until every unit's rollouts are committed."""

from collections.abc import Container
from functools import partial
from typing import Any, cast

import ray

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Committed, Note, Progressed, Report, StepFinished, StepStarted
from personaspace.cluster.generators import (
    GenerationReport,
    Generator,
    UnitPlan,
    import_unit,
    inspect_rollouts,
)
from personaspace.cluster.job import Job
from personaspace.cluster.session import share
from personaspace.cluster.waiting import next_finished, result
from personaspace.extract.chat import ChatFormat
from personaspace.store.commit import adopt
from personaspace.store.errors import InputError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence
from personaspace.store.records import ROLLOUTS, Slot, read_slots


def missing_units(job: Job, committed: Container[Slot]) -> set[int]:
    """Units whose rollouts are not committed, or are to be made again; ``committed`` as of `Job.committed`."""
    return {unit for unit in range(job.layout.units) if (ROLLOUTS, unit, 0) not in committed}


def generate(job: Job, fence: Fence, cluster: ClusterConfig, report: Report) -> None:
    """Commit the rollouts of every unit: adopt what a crash left, import or sample the rest.

    Raises WorkerError naming the rollouts if a batch fails, LeaseError if another driver took over.
    """
    redone = {unit for array, unit, _ in job.redo if array == ROLLOUTS}
    present = {entry.key for entry in job.folder.list(ROLLOUTS)}
    orphans = {unit for unit in missing_units(job, job.committed()) - redone if rollouts_key(unit) in present}
    for unit in sorted(orphans):
        adopt(
            fence,
            (ROLLOUTS, unit, 0),
            rollouts_key(unit),
            rows=job.layout.unit_row_range(unit),
            inspect=partial(inspect_rollouts, job.ids(unit)),
        )
    stored = {slot: number for slot, number in job.committed().items() if slot[0] == ROLLOUTS}
    missing = missing_units(job, stored)
    rows_missing = sum(len(job.layout.unit_row_range(unit)) for unit in missing)
    dropped = {row: why for record in read_slots(job.folder, stored).values() for row, why in record.dropped.items()}
    done = job.layout.rows - rows_missing
    report(StepStarted(step="generate", rows=job.layout.rows, rows_done=done, dropped=dropped))
    if job.generate.responses is not None:
        chat = ChatFormat(job.checkpoint, job.model)
        for unit in sorted(missing):
            _tell(report, import_unit(fence, _unit_plan(job, unit, missing), chat, job.checkpoint.max_positions))
    elif missing:
        _sample(job, fence, cluster, missing, report)
    report(StepFinished(step="generate"))


def _sample(job: Job, fence: Fence, cluster: ClusterConfig, missing: set[int], report: Report) -> None:
    batches = [batch for batch in job.generation_batches if missing & set(batch)]
    count = min(cluster.generators, len(batches))
    workers = share(cluster, count)
    report(Note(text=f"generate: {count} generator(s), {workers.threads} thread(s) each, on {workers.device}"))
    actors = [
        cast(Any, Generator)
        .options(**workers.options())
        .remote(job.checkpoint, job.model, job.generate, fence, workers.device, workers.threads)
        for _ in range(count)
    ]
    running: dict[Any, Any] = {}

    def submit(actor: Any) -> None:
        if batches:
            running[actor.generate.remote([_unit_plan(job, unit, missing) for unit in batches.pop(0)])] = actor

    try:
        for actor in actors:
            submit(actor)
        while running:
            done = next_finished(running, report)
            submit(running.pop(done))
            _tell(report, result(done))
    finally:
        for actor in actors:
            ray.kill(actor)


def _unit_plan(job: Job, unit: int, missing: set[int]) -> UnitPlan:
    rows = tuple(job.rows[row] for row in job.layout.unit_row_range(unit))
    roles = tuple(job.plan.roles[row.role_id].id for row in rows)
    unknown = [row for row, role in zip(rows, roles, strict=True) if not row.messages and row.response is None]
    if unknown:
        raise InputError(
            f"personas: {len(unknown)} rollouts of unit {unit} (such as {unknown[0].rollout_id}, role "
            f"{job.plan.roles[unknown[0].role_id].id!r}) belong to this run, are not generated yet, and are not in the "
            "config. Give a config that has their roles, prompts and questions."
        )
    generation = job.redo.get((ROLLOUTS, unit, 0), 0)
    return UnitPlan(unit=unit, rows=rows, roles=roles, committed=unit not in missing, generation=generation)


def _tell(report: Report, done: GenerationReport) -> None:
    report(Progressed(tokens=done.tokens, rows=done.rows))
    report(Committed(rows=done.rows, dropped=done.dropped))
