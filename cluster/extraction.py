"""The extract step: streams windows of rollouts through replicas of stage actors until every shard is committed."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from ray.experimental.collective import create_collective_group

from personaspace.cluster.adoption import adopt_orphans
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.coordinates import commit_coordinates
from personaspace.cluster.events import (
    Busy,
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
from personaspace.cluster.generation import missing_units
from personaspace.cluster.job import Job
from personaspace.cluster.replicas import Formation, alive_nodes
from personaspace.cluster.room import Workers, fit_in_flight
from personaspace.cluster.schedule import UNCOMMITTED_WINDOWS, Schedule, Task
from personaspace.cluster.session import share_cluster
from personaspace.cluster.sharding import Share, extraction_actors, extraction_shares, load_each, load_gang
from personaspace.cluster.shards import UnitShards
from personaspace.cluster.stages import Order, Ran, StageActor, StageSpec
from personaspace.cluster.supervisor import Supervisor
from personaspace.cluster.window import WindowWork, load_window, response_tokens, span_rows
from personaspace.extract.shape import BYTES_OF
from personaspace.store.errors import InputError
from personaspace.store.lease import Fence
from personaspace.store.records import COORDINATES_RECORD, SPAN_COORDINATES_RECORD, Slot, read_slots
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import ArraySpec

THREADS = 32
"""Of the driver, for coordinates and for windows that come next."""
AHEAD = 2
"""Windows that are read before a replica asks for them."""


def extract(job: Job, fence: Fence, cluster: ClusterConfig, report: Report) -> None:
    """Commit every shard and the coordinates of every unit.

    Shards that a crash left without a record are adopted; windows that miss any shard run again, whole, and
    commit what is missing. Raises InputError if rollouts are missing, WorkerError if work can't go on.
    """
    absent = missing_units(job, job.committed())
    if absent:
        raise InputError(
            f"{job.folder.url}: {len(absent)} of {job.layout.units} units have no rollouts; run `generate` first."
        )
    adopt_orphans(job, fence)
    done = job.committed()
    coordinates = read_slots(job.folder, {slot: n for slot, n in done.items() if slot[0] == COORDINATES_RECORD})
    shards = sum(len(spec.wanted_groups(job.layout)) for spec in job.manifest.arrays)
    missing = {unit: found for unit in range(job.layout.units) if (found := job.missing_shards(done, unit))}
    dropped = {row: why for record in coordinates.values() for row, why in record.dropped.items()}

    def is_behind(unit: int) -> bool:
        """Its shards are all there, and its coordinates don't say so."""
        record = coordinates.get((COORDINATES_RECORD, unit, 0))
        whole = record is not None and len(record.covers) >= shards
        return unit not in missing and not (whole and (not job.parts or (SPAN_COORDINATES_RECORD, unit, 0) in done))

    def catch_up(unit: int) -> dict[int, str]:
        rollouts = read_rollouts(job.folder, [unit])
        return commit_coordinates(job, fence, unit, response_tokens(rollouts), span_rows(job, rollouts))

    with ThreadPoolExecutor(THREADS, "coordinates") as pool:
        for reasons in pool.map(catch_up, filter(is_behind, range(job.layout.units))):
            dropped |= reasons
    waiting = sum(len(job.layout.unit_row_range(unit)) for unit in missing)
    report(StepStarted(step="extract", rows=job.layout.rows, rows_done=job.layout.rows - waiting, dropped=dropped))
    if missing:
        unfinished = [window for window in job.windows if missing.keys() & set(window)]
        _run(job, fence, cluster, unfinished, done, report)
    report(StepFinished(step="extract"))


def _run(
    job: Job,
    fence: Fence,
    cluster: ClusterConfig,
    windows: Sequence[tuple[int, ...]],
    committed: Mapping[Slot, int],
    report: Report,
) -> None:
    missing = {array for units in windows for unit in units for array, _ in job.missing_shards(committed, unit)}
    arrays = tuple(spec for spec in job.manifest.arrays if spec.record in missing)
    nodes = alive_nodes()
    actors = extraction_actors(job, cluster, nodes)
    workers = share_cluster(cluster, nodes, actors)
    shares = extraction_shares(job, cluster, actors, workers.device)
    transport = None
    if cluster.transport == "direct" and cluster.sharding == "pipeline" and actors > 1:
        transport = "nccl" if workers.device == "cuda" else "gloo"
    pool = ThreadPoolExecutor(THREADS, "extraction")
    work = Extraction(job, fence, shares, windows, committed, arrays, transport, pool, report)
    specs = [stage_spec(job, fence, share, arrays, workers, direct=transport is not None) for share in shares]
    formation = Formation(
        actors=actors,
        workers=workers,
        together=cluster.sharding == "tensor",
        make=lambda place, options: cast(Any, StageActor).options(**options).remote(specs[place]),
        load=load_gang if cluster.sharding == "tensor" else load_each,
        connect=None if transport is None else lambda actors: join_directly(actors, transport),
    )
    state_bytes = job.extract.micro_batch_tokens * job.layout.hidden * BYTES_OF[job.model.settled_dtype]
    schedule = Schedule(
        range(len(windows)),
        work.open_window,
        in_flight=cluster.in_flight or fit_in_flight(nodes, actors, state_bytes),
        uncommitted=UNCOMMITTED_WINDOWS,
        attempts=cluster.attempts,
    )
    parts = ", ".join(share.name for share in shares)
    threads = f"{workers.threads} thread(s) each, on {workers.device}"
    report(Note(text=f"extract: replicas of {actors} ({cluster.sharding}: {parts}), {threads}"))
    try:
        Supervisor("extract", schedule, formation, work, cluster, report, patience=job.store.patience).run()
    finally:
        pool.shutdown(cancel_futures=True)


def join_directly(actors: Sequence[Any], transport: str) -> None:
    """Let a replica's stages send each other tensors by Ray Direct Transport."""
    create_collective_group(list(actors), backend="nccl" if transport == "nccl" else "torch_gloo")


def stage_spec(
    job: Job, fence: Fence, share: Share, arrays: tuple[ArraySpec, ...], workers: Workers, *, direct: bool
) -> StageSpec:
    """What an actor of a replica is made from."""
    layers = sorted({layer for spec in arrays for layer in spec.wanted_layers(job.layout)})
    return StageSpec(
        checkpoint=job.checkpoint,
        dtype=job.model.settled_dtype,
        attention=job.model.attention,
        share=share,
        layers=tuple(layer for layer in layers if layer in share.written),
        arrays=arrays,
        packed=job.packed,
        compiled=job.extract.compile,
        layout=job.layout,
        spans_per_rollout=job.manifest.spans_per_rollout,
        precision=job.store.precision,
        fence=fence,
        device=workers.device,
        threads=workers.threads,
        hooks=job.hooks,
        direct=direct,
    )


class Extraction:
    """What the step asks of its replicas (supervisor.Work), and what becomes of their answers.

    Windows are numbered as in ``windows``; ``committed`` says what was there before; ``transport`` takes hidden states
    from stage to stage, by Ray's names (None: its object store).
    """

    def __init__(
        self,
        job: Job,
        fence: Fence,
        shares: Sequence[Share],
        windows: Sequence[tuple[int, ...]],
        committed: Mapping[Slot, int],
        arrays: tuple[ArraySpec, ...],
        transport: str | None,
        pool: ThreadPoolExecutor,
        report: Report,
    ) -> None:
        self._job, self._fence, self._shares, self._report = job, fence, shares, report
        self._transport = transport
        self._pool = pool
        """Does what would keep the driver from feeding its replicas."""
        self._ahead: dict[int, Future[WindowWork]] = {}
        self._read = 0
        """Windows that have been read, or are being read: the first so many."""
        self._windows, self._committed, self._arrays = windows, committed, arrays
        self._open: dict[int, WindowWork] = {}

    def open_window(self, window: int) -> list[int]:
        """Read the window's rollouts, and the next ones ahead; returns how many each of its micro-batches has."""
        while self._read < min(window + 1 + AHEAD, len(self._windows)):
            units = self._windows[self._read]
            self._ahead[self._read] = self._pool.submit(load_window, self._job, units, self._arrays)
            self._read += 1
        if window in self._ahead:
            self._open[window] = self._ahead.pop(window).result()
        return [len(batch.rows) for batch in self._open[window].batches]

    def submit(self, actors: Sequence[Any], task: Task) -> list[Any]:
        """Send a micro-batch through the stages, of which the last one answers, or to all ranks."""
        work = self._open[task.window]
        batch = work.batches[task.batch]
        order = Order(
            window=task.window,
            batch=batch,
            rollout_ids=tuple(work.rollout_ids[row] for row in batch.rows),
            left_out=dict.fromkeys(task.blanked, QUARANTINED),
            trial=task.trial,
        )
        if self._shares[0].sharding == "tensor":
            return [actor.forward.remote(order, None) for actor in actors]
        passed = None
        for actor in actors[:-1]:
            passed = actor.forward.options(tensor_transport=self._transport).remote(order, passed)
        return [actors[-1].forward.remote(order, passed)]

    def finished(self, replica: int, task: Task, answers: Sequence[Ran]) -> None:
        """Tell what came through."""
        work = self._open[task.window]
        batch = work.batches[task.batch]
        parts = max(ran.parts for ran in answers)
        if parts > 1:
            rows, length = batch.shape
            self._report(
                Note(
                    text=f"extract: out of memory with {rows} x {length} tokens; ran them in {parts} parts. A "
                    "smaller extract.micro_batch_tokens avoids this (in a new run)."
                )
            )
        what = f"window {task.window}, micro-batch {task.batch}" + (" on trial" if task.trial else "")
        self._report(
            Worked(step="extract", replica=replica, batch=what, busy=tuple(b for ran in answers for b in ran.busy))
        )
        if task.trial:
            return
        if task.blanked:
            ids = [work.rollout_ids[batch.rows[place]] for place in sorted(task.blanked)]
            self._report(Quarantined(step="extract", rollouts=dict.fromkeys(ids, QUARANTINED)))
        self._report(Progressed(tokens=batch.tokens, rows=len(batch.rows)))

    def commit(self, actors: Sequence[Any], window: int) -> list[Any]:
        """Have every stage check, write and record its shards of the window."""
        work, job = self._open[window], self._job
        commits = []
        for actor, share in zip(actors, self._shares, strict=True):
            size = job.layout.layer_group
            own = range(share.written.start // size, math.ceil(share.written.stop / size))
            units = []
            for unit in work.units:
                rows = job.layout.unit_row_range(unit)
                missing = job.missing_shards(self._committed, unit)
                units.append(
                    UnitShards(
                        unit=unit,
                        shards=tuple((array, group) for array, group in missing if group in own),
                        dropped={row: why for row, why in work.dropped.items() if row in rows},
                        expected={row: work.expected[row] for row in rows if row in work.expected},
                        source=work.sources[unit],
                        redo={(array, g): n for (array, u, g), n in job.redo.items() if u == unit},
                    )
                )
            commits.append(actor.commit.remote(window, units))
        return commits

    def committed(self, replica: int, window: int, answers: Sequence[Busy]) -> list[Future[Event]]:
        """Commit the coordinates of the window's units: their layers are all there."""
        work = self._open.pop(window)
        self._report(Worked(step="extract", replica=replica, batch=f"window {window}", busy=tuple(answers)))
        return [
            self._pool.submit(self._commit_coordinates, unit, work)
            for unit in work.units
            if self._job.missing_shards(self._committed, unit)
        ]

    def _commit_coordinates(self, unit: int, work: WindowWork) -> Event:
        dropped = commit_coordinates(self._job, self._fence, unit, work.tokens, work.spans)
        return Committed(rows=len(self._job.layout.unit_row_range(unit)), dropped=dropped)
