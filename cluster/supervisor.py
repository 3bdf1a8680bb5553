"""The loop that keeps replicas at work until a schedule is done, whatever happens to them."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event, Loaded, Note, ReplicaLost, ReplicaStarted, Report, Waiting
from personaspace.cluster.faults import NODE_DIED, describe_loss, user_error
from personaspace.cluster.replicas import (
    Formation,
    Replica,
    alive_nodes,
    end_replica,
    placed_on,
    start_replica,
)
from personaspace.cluster.room import room
from personaspace.cluster.schedule import Commit, Schedule, Task
from personaspace.store.errors import WorkerError

TICK = 2.0
"""Seconds between two looks at replicas and nodes while nothing else happens."""
FAILED_STARTS = 3
"""Replicas that may be lost one after the other while they load."""


class Work(Protocol):
    """What a step asks of its replicas. References that it returns must all be answered."""

    def submit(self, actors: Sequence[Any], task: Task) -> Sequence[Any]:
        """Run a micro-batch."""

    def finished(self, replica: int, task: Task, answers: Sequence[Any]) -> None:
        """It came through."""

    def commit(self, actors: Sequence[Any], window: int) -> Sequence[Any]:
        """Store a window."""

    def committed(self, replica: int, window: int, answers: Sequence[Any]) -> Iterable[Future[Event]]:
        """It is stored. Returns what is still being done for it in threads, and to be told once it is done."""


@dataclass(slots=True, eq=False)
class _Call:
    """What a replica was asked for."""

    replica: Replica
    action: Task | Commit | None
    """None: to load its model."""
    references: Sequence[Any]
    answers: dict[Any, Any] = field(default_factory=dict)


class Supervisor:
    """Runs ``work`` on replicas of ``formation`` as ``schedule`` says.

    As many replicas as ``config`` asks for, or as there is room for on the nodes that are there at the time. One that
    loses an actor, raises, or hangs is ended and started anew. Workers may wait ``patience`` seconds for storage.
    """

    def __init__(
        self,
        step: str,
        schedule: Schedule,
        formation: Formation,
        work: Work,
        config: ClusterConfig,
        report: Report,
        *,
        patience: float,
    ) -> None:
        self._step, self._schedule, self._formation, self._work = step, schedule, formation, work
        self._config, self._report, self._patience = config, report, patience
        self._replicas: dict[int, Replica] = {}
        self._calls: dict[Any, _Call] = {}
        """Reference -> the call that it answers."""
        self._afterwork: list[Future[Event]] = []
        self._started = 0
        self._failed_starts = 0
        self._last_failed_start = 0.0
        self._last_tick = 0.0
        self._last_active = time.monotonic()
        self._warned = 0.0

    def run(self) -> None:
        """Return once everything is committed. No replica is left, whatever happened.

        Raises the user's error that a worker raised; WorkerError where a micro-batch kills workers whatever is in it,
        where replicas can't be started, and where there is no room for one for too long.
        """
        try:
            self._tick()
            while not self._schedule.done:
                for call in self._answered():
                    self._handle(call)
                self._settle(wait=False)
                if time.monotonic() - self._last_tick >= TICK:
                    self._tick()
            self._settle(wait=True)
        finally:
            for replica in self._replicas.values():
                end_replica(replica)

    def _answered(self) -> Iterable[_Call]:
        """Calls of which all answers are there, or one is an error."""
        references = list(self._calls)
        if not references:
            time.sleep(TICK / 10)
            return
        finished, _ = ray.wait(references, num_returns=1, timeout=TICK)
        if finished:
            finished, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for reference in finished:
            call = self._calls.pop(reference, None)
            if call is None:
                continue  # Its replica was lost a moment ago.
            try:
                call.answers[reference] = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._failed(call, error)
                continue
            call.replica.heard = time.monotonic()
            if len(call.answers) == len(call.references):
                call.replica.unanswered -= 1
                yield call

    def _settle(self, *, wait: bool) -> None:
        """Tell what threads have done. Raises what they raised."""
        for future in list(self._afterwork):
            if wait or future.done():
                self._afterwork.remove(future)
                self._report(future.result())

    def _handle(self, call: _Call) -> None:
        replica, answers = call.replica, [call.answers[reference] for reference in call.references]
        match call.action:
            case None:
                if not self._begin(replica, answers):
                    return
            case Task() as task:
                self._schedule.finish(replica.number, task)
                self._work.finished(replica.number, task, answers)
            case Commit(window=window):
                self._schedule.committed(replica.number, window)
                self._afterwork += self._work.committed(replica.number, window, answers)
        self._feed(replica)

    def _begin(self, replica: Replica, loaded: Sequence[Loaded]) -> bool:
        if self._formation.connect is not None:
            try:
                self._formation.connect(replica.actors)
            except ray.exceptions.RayError as error:
                self._lose(replica, WorkerError(describe_loss(error)), blame=None)
                return False
        replica.active = True
        replica.nodes = frozenset(worker.node for worker in loaded)
        self._failed_starts = 0
        self._schedule.join(replica.number)
        self._report(ReplicaStarted(step=self._step, replica=replica.number, workers=tuple(loaded)))
        return True

    def _feed(self, replica: Replica) -> None:
        """Submit what is due to the replica."""
        for action in self._schedule.due(replica.number):
            if isinstance(action, Task):
                self._await(_Call(replica, action, self._work.submit(replica.actors, action)))
            else:
                self._await(_Call(replica, action, self._work.commit(replica.actors, action.window)))

    def _await(self, call: _Call) -> None:
        self._calls |= dict.fromkeys(call.references, call)
        if not call.replica.unanswered:
            call.replica.heard = time.monotonic()
        call.replica.unanswered += 1

    def _failed(self, call: _Call, error: ray.exceptions.RayError) -> None:
        """An answer is an error: the replica is lost, or the run ends with what a worker has to say to the user."""
        cause = user_error(error)
        if cause is not None and (not isinstance(cause, WorkerError) or isinstance(call.action, Commit)):
            raise cause  # Another worker would say the same.
        replica = call.replica
        if cause is not None:
            self._lose(replica, cause, blame=[call.action] if isinstance(call.action, Task) else [])
            return
        gone = replica.nodes - {node.id for node in alive_nodes()}
        loss = WorkerError(NODE_DIED if gone else describe_loss(error))
        self._lose(replica, loss, blame=[] if gone else None)

    def _lose(self, replica: Replica, reason: WorkerError, *, blame: Sequence[Task] | None) -> None:
        end_replica(replica)
        del self._replicas[replica.number]
        for reference in [reference for reference, call in self._calls.items() if call.replica is replica]:
            del self._calls[reference]
        self._last_tick = 0.0  # At once.
        short = str(reason).strip().splitlines()[-1]
        if not replica.active:
            # What was lost together, as with a node, is one failure, and a node's end is nobody's fault.
            if replica.asked > self._last_failed_start and reason.args != (NODE_DIED,):
                self._failed_starts += 1
                self._last_failed_start = time.monotonic()
            self._report(ReplicaLost(step=self._step, replica=replica.number, reason=short, windows=0, rollouts=0))
            if self._failed_starts >= FAILED_STARTS:
                raise WorkerError(
                    f"{self._step}: {self._failed_starts} replicas in a row were lost while they loaded the model: "
                    f"{reason}\nWhat is committed is safe; the same command resumes."
                )
            return
        loss = self._schedule.leave(replica.number, blame=blame)
        self._report(
            ReplicaLost(
                step=self._step, replica=replica.number, reason=short, windows=loss.windows, rollouts=loss.rollouts
            )
        )
        if isinstance(loss.hopeless, Commit):
            raise WorkerError(
                f"{self._step}: storing window {loss.hopeless.window} ended its worker every time: {reason}\nIf "
                "memory ran out, use nodes with more of it, or, in a new run, a smaller extract.window_rows. What is "
                "committed is safe; the same command resumes."
            )
        if loss.hopeless is not None:
            raise WorkerError(
                f"{self._step}: a micro-batch ended its worker {self._schedule.deaths(loss.hopeless)} times, even "
                f"when it held nothing but dummies, so no rollout is to blame: {reason}\nIf memory ran out, use more "
                "cluster.stages (or, in a new run, a smaller extract.micro_batch_tokens). What is committed is safe; "
                "the same command resumes."
            )
        for other in self._replicas.values():
            if other.active:
                self._feed(other)

    def _tick(self) -> None:
        """Look after replicas: enough of them, none of them hung."""
        now = self._last_tick = time.monotonic()
        self._report(Waiting(windows=self._schedule.waiting))
        computing = {call.replica.number for call in self._calls.values() if isinstance(call.action, Task)}
        for replica in list(self._replicas.values()):
            if not replica.placed and (nodes_of := placed_on(replica)):
                replica.nodes, replica.placed, replica.heard = nodes_of, True, now
            limit = self._config.stall_timeout if replica.active else self._config.start_timeout
            if replica.active and replica.number not in computing:
                limit += self._patience  # It waits for storage.
            if replica.placed and replica.unanswered and now - replica.heard > limit:
                doing = "at work" if replica.active else "loading its model"
                self._lose(replica, WorkerError(f"no answer for {limit:.0f} s while {doing}"), blame=None)
        nodes = alive_nodes()
        wanted = self._config.replicas or room(nodes, self._formation.workers, self._formation.actors)
        needed = self._schedule.waiting + sum(replica.active for replica in self._replicas.values())
        while len(self._replicas) < min(wanted, needed):
            replica = start_replica(self._started, self._formation)
            self._replicas[replica.number] = replica
            self._await(_Call(replica, None, replica.loading))
            self._started += 1
        if any(replica.placed for replica in self._replicas.values()):
            self._last_active = now
        elif now - self._last_active > self._config.wait_timeout:
            raise WorkerError(
                f"{self._no_room()} Waited {self._config.wait_timeout:.0f} s. What is committed is safe; "
                "the same command resumes."
            )
        elif now - max(self._last_active, self._warned) > 10:
            self._warned = now + 20
            self._report(Note(text=f"{self._no_room()} Waiting for it."))

    def _no_room(self) -> str:
        each = self._formation.workers.bundle
        where = " on one node" if self._formation.together and self._formation.actors > 1 else ""
        need = " and ".join(f"{self._formation.actors * amount:g} {name}s" for name, amount in each.items())
        return f"{self._step}: no replica has room; one needs {need}{where}, in shares of {each}."
