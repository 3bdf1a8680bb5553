"""What runs where and when: a state machine without Ray, for generation and extraction alike.

Windows wait in one queue, and a faster replica takes more of them. A replica that is lost gives its windows back, to
the front of the queue; since a window is a pure function of the plan, whoever runs it again gets the same. A
micro-batch that was on its way too often when a replica was lost runs alone, and is put on trial (quarantine.py).
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from personaspace.cluster.quarantine import Quarantine

UNCOMMITTED_WINDOWS = 2
"""Windows of a replica that may wait for their writers: bounds the host memory of its stages."""
OpenWindow = Callable[[int], Sequence[int]]
"""Loads a window; returns the number of rollouts in each of its micro-batches. None of them: nothing to compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One micro-batch to run."""

    window: int
    batch: int
    """Its number in the window."""
    blanked: frozenset[int] = frozenset()
    """Places in the micro-batch whose rollouts are replaced by dummies."""
    trial: bool = False
    """Nothing that it gives is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A window to commit: all its micro-batches came through."""

    window: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What a replica took with it."""

    windows: int
    """That have to run again."""
    rollouts: int
    """That had come through, and have to run again."""
    hopeless: Task | Commit | None
    """What ends its worker every time: a micro-batch whatever is in it, or a window to be stored."""


@dataclass(slots=True)
class _Window:
    """A window that a replica works on."""

    sizes: Sequence[int]
    suspects: list[int]
    """Micro-batches to be run alone, before any other."""
    waiting: deque[int]
    done: set[int] = field(default_factory=set)
    committing: bool = False


@dataclass(slots=True)
class _Replica:
    windows: dict[int, _Window] = field(default_factory=dict)
    flying: set[Task] = field(default_factory=set)


class Schedule:
    """All replicas of a step, and the windows that they share.

    A replica gets up to ``in_flight`` micro-batches at once, across window borders, and none while ``uncommitted`` of
    its windows are being committed. A micro-batch is put on trial after ``attempts`` lost replicas.
    """

    def __init__(
        self, windows: Iterable[int], open_window: OpenWindow, *, in_flight: int, uncommitted: int, attempts: int
    ) -> None:
        self._queue = deque(windows)
        self._open_window = open_window
        self._in_flight, self._uncommitted, self._attempts = in_flight, uncommitted, attempts
        self._replicas: dict[int, _Replica] = {}
        self._strikes: Counter[tuple[int, int]] = Counter()
        self._commit_strikes: Counter[int] = Counter()
        self._trials: dict[tuple[int, int], Quarantine] = {}

    @property
    def done(self) -> bool:
        """Every window is committed."""
        return not self._queue and not any(replica.windows for replica in self._replicas.values())

    @property
    def waiting(self) -> int:
        """Windows that no replica has taken."""
        return len(self._queue)

    def join(self, replica: int) -> None:
        """A replica is ready for work."""
        self._replicas[replica] = _Replica()

    def due(self, replica: int) -> Iterator[Task | Commit]:
        """What to submit to the replica now. What is yielded counts as on its way."""
        state = self._replicas[replica]
        while True:
            for number, window in state.windows.items():
                if len(window.done) == len(window.sizes) and not window.committing:
                    window.committing = True
                    yield Commit(window=number)
            if sum(window.committing for window in state.windows.values()) >= self._uncommitted:
                return
            if len(state.flying) >= self._in_flight or any(self._on_trial(task) for task in state.flying):
                return
            suspect = self._suspect(state)
            if suspect is not None and state.flying:
                return
            task = suspect or self._next(state)
            if task is not None:
                state.flying.add(task)
                yield task
            elif not self._take(state):
                return

    def finish(self, replica: int, task: Task) -> None:
        """The micro-batch came through."""
        state, key = self._replicas[replica], (task.window, task.batch)
        state.flying.remove(task)
        self._strikes.pop(key, None)
        if self._on_trial(task):
            self._trials[key].passed()
        if not task.trial:
            window = state.windows[task.window]
            window.suspects = [batch for batch in window.suspects if batch != task.batch]
            window.done.add(task.batch)

    def committed(self, replica: int, window: int) -> None:
        """The window is committed."""
        del self._replicas[replica].windows[window]

    def leave(self, replica: int, *, blame: Collection[Task] | None = None) -> Loss:
        """A replica is lost. ``blame``: the micro-batches that may have killed it; default: all on their way."""
        state = self._replicas.pop(replica)
        hopeless: Task | Commit | None = None
        for number, window in state.windows.items():
            if window.committing and blame is None:
                self._commit_strikes[number] += 1
                # A trial begins before that, and nothing is stored beside it.
                if self._commit_strikes[number] > self._attempts:
                    hopeless = Commit(window=number)
        for task in state.flying if blame is None else state.flying & set(blame):
            key = (task.window, task.batch)
            if self._on_trial(task):
                self._trials[key].died()
                hopeless = task if self._trials[key].hopeless else hopeless
                continue
            self._strikes[key] += 1
            if self._strikes[key] >= self._attempts:
                del self._strikes[key]
                size = state.windows[task.window].sizes[task.batch]
                self._trials[key] = Quarantine(size, culprits=set(task.blanked), deaths=self._attempts)
        self._queue.extendleft(reversed(state.windows))
        return Loss(
            windows=len(state.windows),
            rollouts=sum(window.sizes[batch] for window in state.windows.values() for batch in window.done),
            hopeless=hopeless,
        )

    def deaths(self, task: Task) -> int:
        """How many replicas the micro-batch has cost, as far as it has been on trial."""
        trial = self._trials.get((task.window, task.batch))
        return 0 if trial is None else trial.deaths

    def _on_trial(self, task: Task) -> bool:
        trial = self._trials.get((task.window, task.batch))
        return trial is not None and not trial.settled

    def _suspect(self, state: _Replica) -> Task | None:
        """The next run of a trial."""
        for number, window in state.windows.items():
            for batch in window.suspects:
                trial = self._trials[(number, batch)]
                return Task(window=number, batch=batch, blanked=trial.blanked, trial=trial.is_trial)
        return None

    def _next(self, state: _Replica) -> Task | None:
        for number, window in state.windows.items():
            if window.waiting:
                batch = window.waiting.popleft()
                trial = self._trials.get((number, batch))
                return Task(window=number, batch=batch, blanked=trial.blanked if trial else frozenset())
        return None

    def _take(self, state: _Replica) -> bool:
        """Open the next window of the queue; one with a trial only if nothing else could be lost by it."""
        suspected = {window for (window, _), trial in self._trials.items() if not trial.settled}
        for place, number in enumerate(self._queue):
            if number not in suspected or not state.windows:
                del self._queue[place]
                sizes = self._open_window(number)
                suspects = [batch for batch in range(len(sizes)) if self._on_trial(Task(window=number, batch=batch))]
                waiting = deque(batch for batch in range(len(sizes)) if batch not in suspects)
                state.windows[number] = _Window(sizes=sizes, suspects=suspects, waiting=waiting)
                return True
        return False
