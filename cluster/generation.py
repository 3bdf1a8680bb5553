"""The generate step: hands batches of units to generator actors until every unit's rollouts are committed."""

from collections.abc import Container, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, cast

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.engines import GeneratorSpec, choose_crew
from personaspace.cluster.events import (
    Committed,
    Event,
    Note,
    Progressed,
    Quarantined,
    Report,
    StepFinished,
    StepStarted,
    Worked,
)
from personaspace.cluster.faults import QUARANTINED
from personaspace.cluster.generators import (
    Generator,
    Order,
    Sampled,
    Stored,
    UnitPlan,
    drops,
    import_unit,
    inspect_rollouts,
)
from personaspace.cluster.job import Job
from personaspace.cluster.replicas import Formation, alive_nodes
from personaspace.cluster.schedule import Schedule, Task
from personaspace.cluster.sharding import load_each, load_gang, offload_of
from personaspace.cluster.shards import ShardWriter
from personaspace.cluster.supervisor import Supervisor
from personaspace.extract.chat import ChatFormat
from personaspace.store.commit import adopt
from personaspace.store.errors import InputError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence
from personaspace.store.records import ROLLOUTS, Agreement, Slot, read_slots

UNCOMMITTED_BATCHES = 2
"""Sampled batches of a generator that may wait to be stored."""


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
            rollouts = import_unit(fence, unit_plan(job, unit, missing), chat, job.checkpoint.max_positions)
            tokens = sum(len(rollout.response_token_ids) for rollout in rollouts)
            report(Progressed(tokens=tokens, rows=len(rollouts)))
            report(Committed(rows=len(rollouts), dropped=drops(rollouts)))
    elif missing:
        _sample(job, fence, cluster, missing, report)
    report(StepFinished(step="generate"))


def _sample(job: Job, fence: Fence, cluster: ClusterConfig, missing: set[int], report: Report) -> None:
    batches = [batch for batch in job.generation_batches if missing & set(batch)]
    crew = choose_crew(job.generate, cluster, alive_nodes())
    workers = crew.workers
    work = Generation(job, batches, missing, report)
    specs = [
        GeneratorSpec(
            checkpoint=job.checkpoint,
            model=job.model,
            config=job.generate,
            auditor=job.auditor,
            vllm=cluster.vllm,
            fence=fence,
            sharding=crew.sharding,
            rank=rank,
            ranks=crew.ranks,
            offload=offload_of(cluster, workers.device) if crew.sharding == "offload" else None,
            capture=_writer(job, fence) if job.generate.capture else None,
            hooks=job.hooks,
            device=workers.device,
            threads=workers.threads,
        )
        for rank in range(crew.actors)
    ]
    formation = Formation(
        actors=crew.actors,
        workers=workers,
        together=True,
        make=lambda rank, options: cast(Any, Generator).options(**options, **crew.options).remote(specs[rank]),
        load=load_gang if crew.actors > 1 else load_each,
    )
    schedule = Schedule(
        range(len(batches)), work.open_window, in_flight=1, uncommitted=UNCOMMITTED_BATCHES, attempts=cluster.attempts
    )
    # The longest batch is a conversation of that many turns, each of which may take as long as a whole batch elsewhere.
    turns = max((row.turns for row in job.rows.values()), default=1)
    threads = f"{workers.threads} thread(s) each, on {workers.device}"
    report(Note(text=f"generate: {job.generate.engine}, replicas of {crew.actors} ({crew.name}), {threads}"))
    config = replace(
        cluster,
        replicas=cluster.replicas or crew.replicas,
        stall_timeout=max(cluster.stall_timeout, crew.stall_timeout) * turns,
    )
    Supervisor("generate", schedule, formation, work, config, report, patience=job.store.patience).run()
    if work.agreement:
        report(Note(text=describe_agreement(work.agreement)))


def _writer(job: Job, fence: Fence) -> ShardWriter:
    """What writes the shards of activations that are captured."""
    arrays = job.manifest.arrays
    return ShardWriter(
        fence=fence,
        layout=job.layout,
        arrays=arrays,
        layers=tuple(sorted({layer for spec in arrays for layer in spec.wanted_layers(job.layout)})),
        spans_per_rollout=job.manifest.spans_per_rollout,
        precision=job.store.precision,
    )


def describe_agreement(sampled: Sequence[Agreement]) -> str:
    """What a sample says of activations that were captured."""
    cosine, relative = min(each.cosine for each in sampled), max(each.relative for each in sampled)
    return (
        f"generate: activations captured. {len({each.row for each in sampled})} rollouts ran again whole, and agree: "
        f"cosine at least {cosine:.6f}, difference at most {relative:.2%}"
    )


class Generation:
    """What the step asks of its replicas (supervisor.Work). A window is a batch of units that are decoded together."""

    def __init__(self, job: Job, batches: Sequence[tuple[int, ...]], missing: set[int], report: Report) -> None:
        self._job, self._batches, self._missing, self._report = job, batches, missing, report
        self._open: dict[int, tuple[UnitPlan, ...]] = {}
        self.agreement: list[Agreement] = []
        """Of what was captured in this session."""

    def open_window(self, window: int) -> list[int]:
        """Plan the batch; returns how many rollouts it has."""
        units = tuple(unit_plan(self._job, unit, self._missing) for unit in self._batches[window])
        if self._job.generate.engine == "openai":
            # A server's answers don't hang on their company: what is there is not asked for again.
            units = tuple(unit for unit in units if not unit.committed)
        self._open[window] = units
        return [sum(len(unit.rows) for unit in units)]

    def submit(self, actors: Sequence[Any], task: Task) -> list[Any]:
        """Have the batch sampled."""
        order = Order(
            window=task.window,
            units=self._open[task.window],
            left_out=dict.fromkeys(task.blanked, QUARANTINED),
            trial=task.trial,
        )
        return [actor.generate.remote(order) for actor in actors]

    def finished(self, replica: int, task: Task, answers: Sequence[Sampled]) -> None:
        """Tell what came through."""
        what = f"batch {task.window}" + (" on trial" if task.trial else "")
        self._report(
            Worked(step="generate", replica=replica, batch=what, busy=tuple(answer.busy for answer in answers))
        )
        if task.trial:
            return
        units = self._open[task.window]
        if task.blanked:
            rows = [row for unit in units for row in unit.rows]
            ids = [rows[place].rollout_id for place in sorted(task.blanked)]
            self._report(Quarantined(step="generate", rollouts=dict.fromkeys(ids, QUARANTINED)))
        fresh = sum(len(unit.rows) for unit in units if not unit.committed)
        self._report(Progressed(tokens=answers[0].tokens, rows=fresh))

    def commit(self, actors: Sequence[Any], window: int) -> list[Any]:
        """Have the batch's units stored."""
        return [actors[0].commit.remote(window)]

    def committed(self, replica: int, window: int, answers: Sequence[Stored]) -> Iterable[Future[Event]]:
        """Tell what is stored."""
        del self._open[window]
        [stored] = answers
        self._report(Worked(step="generate", replica=replica, batch=f"batch {window}", busy=(stored.busy,)))
        self._report(Committed(rows=stored.rows, dropped=stored.dropped))
        self.agreement += stored.agreement
        return ()


def unit_plan(job: Job, unit: int, missing: set[int]) -> UnitPlan:
    """What a generator has to know of a unit. Raises InputError for rollouts that the config does not have."""
    rows = tuple(job.rows[row] for row in job.layout.unit_row_range(unit))
    roles = tuple(job.plan.roles[row.role_id].id for row in rows)
    unknown = [row for row, role in zip(rows, roles, strict=True) if not row.messages and row.response is None]
    if unknown:
        raise InputError(
            f"personas: {len(unknown)} rollouts of unit {unit} (such as {unknown[0].rollout_id}, role "
            f"{job.plan.roles[unknown[0].role_id].id!r}) belong to this run, are not generated yet, and are not in the "
            "config. Give a config that has their roles, prompts and questions."
        )
    return UnitPlan(
        unit=unit,
        rows=rows,
        roles=roles,
        committed=unit not in missing,
        generation=job.redo.get((ROLLOUTS, unit, 0), 0),
        shards=_captured_shards(job, unit) if unit in missing else (),
    )


def _captured_shards(job: Job, unit: int) -> tuple[tuple[str, int], ...]:
    """What is captured of a unit whose rollouts are made: all shards, but in a repair, which replays."""
    if not job.generate.capture or job.redo:
        return ()
    return job.missing_shards({}, unit)
