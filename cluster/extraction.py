"""The extract step: streams windows of rollouts through replicas of stage actors until every shard is committed."""

import math
from collections import deque
from typing import Any, cast

import ray

from personaspace.cluster.adoption import adopt_orphans
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.coordinates import commit_coordinates
from personaspace.cluster.events import Committed, Note, Progressed, Report, StepFinished, StepStarted
from personaspace.cluster.generation import missing_units
from personaspace.cluster.job import Job
from personaspace.cluster.schedule import ReplicaSchedule, WindowPlan
from personaspace.cluster.session import Workers, share
from personaspace.cluster.stages import Ran, StageActor, StageSpec, UnitShards
from personaspace.cluster.waiting import next_finished, result
from personaspace.cluster.window import WindowWork, load_window, response_tokens, span_rows
from personaspace.extract.collect import Expected
from personaspace.extract.packing import MicroBatch, token_hash
from personaspace.store.errors import InputError
from personaspace.store.lease import Fence
from personaspace.store.records import COORDINATES_RECORD, SPAN_COORDINATES_RECORD, read_slots
from personaspace.store.rollouts import read_rollouts

UNCOMMITTED_WINDOWS = 2
"""Windows of a replica that may wait for their writers: bounds the host memory of its stages."""


def check_stages(job: Job, cluster: ClusterConfig) -> list[int]:
    """Layer boundaries of the stages; InputError if the layer groups don't allow so many.

    Nothing behind the last layer group that is asked for is ever run.
    """
    groups = 1 + max(group for spec in job.manifest.arrays for group in spec.wanted_groups(job.layout))
    try:
        return job.layout.stage_boundaries(cluster.stages, groups)
    except ValueError as error:
        raise InputError(
            f"cluster.stages: {error}. Use fewer stages, or a new run with a smaller layer_group."
        ) from error


def extract(job: Job, fence: Fence, cluster: ClusterConfig, report: Report) -> None:
    """Commit every shard and the coordinates of every unit.

    Shards that a crash left without a record are adopted; windows that miss any shard run again, whole, and
    commit what is missing. Raises InputError if rollouts are missing, WorkerError if a worker fails.
    """
    boundaries = check_stages(job, cluster)
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
    for unit in range(job.layout.units):
        record = coordinates.get((COORDINATES_RECORD, unit, 0))
        whole = record is not None and len(record.covers) >= shards
        if unit not in missing and not (whole and (not job.parts or (SPAN_COORDINATES_RECORD, unit, 0) in done)):
            rollouts = read_rollouts(job.folder, [unit])
            dropped |= commit_coordinates(job, fence, unit, response_tokens(rollouts), span_rows(job, rollouts))
    waiting = sum(len(job.layout.unit_row_range(unit)) for unit in missing)
    report(StepStarted(step="extract", rows=job.layout.rows, rows_done=job.layout.rows - waiting, dropped=dropped))
    if missing:
        unfinished = [window for window in job.windows if missing.keys() & set(window)]
        replicas = min(cluster.replicas, len(unfinished))
        workers = share(cluster, replicas * cluster.stages)
        report(
            Note(
                text=f"extract: {replicas} replica(s) of {cluster.stages} stage(s), layers cut at {boundaries}, "
                f"{workers.threads} thread(s) each, on {workers.device}"
            )
        )
        Extraction(job, fence, cluster, workers, boundaries, deque(unfinished), replicas, report).run()
    report(StepFinished(step="extract"))


class Extraction:
    """One session of the extract step: replicas of stage actors, and the loop that feeds them."""

    def __init__(
        self,
        job: Job,
        fence: Fence,
        cluster: ClusterConfig,
        workers: Workers,
        boundaries: list[int],
        queue: deque[tuple[int, ...]],
        replicas: int,
        report: Report,
    ) -> None:
        self._job, self._fence, self._boundaries, self._report = job, fence, boundaries, report
        self._queue = queue
        self._committed = job.committed()
        missing = {array for units in queue for unit in units for array, _ in job.missing_shards(self._committed, unit)}
        self._arrays = tuple(spec for spec in job.manifest.arrays if spec.record in missing)
        self._work: dict[int, WindowWork] = {}
        self.replicas = [
            [cast(Any, StageActor).options(**workers.options()).remote(spec) for spec in self._specs(workers)]
            for _ in range(replicas)
        ]
        in_flight = cluster.in_flight or 2 * cluster.stages
        self._schedules = [ReplicaSchedule(self._next_window, in_flight) for _ in range(replicas)]
        self._forwards: dict[Any, tuple[int, int, MicroBatch]] = {}
        """Reference to the last stage's answer -> replica, window, micro-batch."""
        self._commits: dict[Any, tuple[int, int]] = {}
        """Reference to one stage's commit -> replica, window."""

    def run(self) -> None:
        """Feed the replicas until all windows are committed. Stage actors are gone afterwards, whatever happened."""
        try:
            self._submit_due()
            while self._forwards or self._commits:
                done = next_finished([*self._forwards, *self._commits], self._report)
                answer = result(done)
                if done in self._forwards:
                    self._forward_done(*self._forwards.pop(done), ran=answer)
                else:
                    self._commit_done(*self._commits.pop(done))
                self._submit_due()
        finally:
            for actor in [actor for replica in self.replicas for actor in replica]:
                ray.kill(actor)

    def _specs(self, workers: Workers) -> list[StageSpec]:
        job = self._job
        layers = sorted({layer for spec in self._arrays for layer in spec.wanted_layers(job.layout)})
        return [
            StageSpec(
                checkpoint=job.checkpoint,
                dtype=job.model.dtype,
                attention=job.model.attention,
                first=first,
                stop=stop,
                last=stop == self._boundaries[-1],
                layers=tuple(layer for layer in layers if first <= layer < stop),
                arrays=self._arrays,
                packed=job.packed,
                compiled=job.extract.compile,
                layout=job.layout,
                spans_per_rollout=job.manifest.spans_per_rollout,
                precision=job.store.precision,
                fence=self._fence,
                device=workers.device,
                threads=workers.threads,
            )
            for first, stop in zip(self._boundaries, self._boundaries[1:], strict=False)
        ]

    def _next_window(self) -> WindowPlan | None:
        while self._queue:
            units = self._queue.popleft()
            window = units[0]  # Units belong to one window each, so the first one names it.
            self._work[window] = load_window(self._job, units, self._arrays)
            if self._work[window].batches:
                return WindowPlan(window=window, batches=self._work[window].batches)
            self._commit_window(0, window)  # Every rollout was dropped: nothing to compute, but to record.
        return None

    def _submit_due(self) -> None:
        for index, schedule in enumerate(self._schedules):
            committing = {window for replica, window in self._commits.values() if replica == index}
            if len(committing) < UNCOMMITTED_WINDOWS:
                for window, batch in schedule.due():
                    self._submit(index, window, batch)

    def _submit(self, index: int, window: int, batch: MicroBatch) -> None:
        rollout_ids = [self._work[window].rollout_ids[row] for row in batch.rows]
        hidden, answer = None, Ran()
        for actor in self.replicas[index]:
            hidden, answer = actor.forward.remote(window, batch, rollout_ids, hidden, answer)
        self._forwards[answer] = (index, window, batch)

    def _forward_done(self, index: int, window: int, batch: MicroBatch, ran: Ran) -> None:
        if ran.parts > 1:
            rows, length = batch.shape
            self._report(
                Note(
                    text=f"extract: out of memory with {rows} x {length} tokens; ran them in {ran.parts} parts. A "
                    "smaller extract.micro_batch_tokens avoids this (in a new run)."
                )
            )
        self._report(Progressed(tokens=batch.tokens, rows=len(batch.rows)))
        if self._schedules[index].finish(window):
            self._commit_window(index, window)

    def _commit_window(self, index: int, window: int) -> None:
        work, job = self._work[window], self._job
        expected = {
            row: Expected(token_hash=token_hash(ids), counts=tuple(stop - start for start, stop in segments))
            for batch in work.batches
            for row, ids, segments in zip(batch.rows, batch.token_ids, batch.segments, strict=True)
        }
        for actor, first, stop in zip(self.replicas[index], self._boundaries, self._boundaries[1:], strict=False):
            own = range(first // job.layout.layer_group, math.ceil(stop / job.layout.layer_group))
            units = []
            for unit in work.units:
                rows = job.layout.unit_row_range(unit)
                missing = job.missing_shards(self._committed, unit)
                units.append(
                    UnitShards(
                        unit=unit,
                        shards=tuple((array, group) for array, group in missing if group in own),
                        dropped={row: why for row, why in work.dropped.items() if row in rows},
                        expected={row: expected[row] for row in rows if row in expected},
                        source=work.sources[unit],
                        redo={(array, g): n for (array, u, g), n in job.redo.items() if u == unit},
                    )
                )
            self._commits[actor.commit.remote(window, units)] = (index, window)

    def _commit_done(self, index: int, window: int) -> None:
        if (index, window) in self._commits.values():
            return
        work = self._work.pop(window)
        for unit in work.units:
            if self._job.missing_shards(self._committed, unit):
                dropped = commit_coordinates(self._job, self._fence, unit, work.tokens, work.spans)
                self._report(Committed(rows=len(self._job.layout.unit_row_range(unit)), dropped=dropped))
