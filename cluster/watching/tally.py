"""Counts what events tell of each step: how far it is, how fast, and what was lost."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from personaspace.cluster.events import (
    Committed,
    Event,
    Progressed,
    Quarantined,
    ReplicaLost,
    ReplicaStarted,
    StepFinished,
    StepStarted,
    Waiting,
)
from personaspace.store.sessions import StepProgress


@dataclass(slots=True)
class _Step:
    started: StepStarted
    begin: float
    end: float | None = None
    committed: int = 0
    processed: int = 0
    tokens: int = 0
    repeated: int = 0
    windows_waiting: int = 0
    dropped: set[int] = field(default_factory=set)
    replicas: set[int] = field(default_factory=set)
    lost: Counter[str] = field(default_factory=Counter)
    quarantined: dict[str, str] = field(default_factory=dict)


class Tally:
    """Takes in events, and says what they come to. Another thread may ask."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._lock = threading.Lock()

    def report(self, event: Event) -> None:
        """Take in one event."""
        with self._lock:
            if isinstance(event, StepStarted):
                self._steps.append(
                    _Step(event, time.monotonic(), committed=event.rows_done, dropped=set(event.dropped))
                )
            elif self._steps:
                _count(self._steps[-1], event)

    def steps(self) -> tuple[StepProgress, ...]:
        """Each step of the session as it stands now."""
        with self._lock:
            return tuple(_progress(step) for step in self._steps)

    @property
    def step(self) -> StepProgress:
        """The step that is under way. Raises IndexError before the first."""
        with self._lock:
            return _progress(self._steps[-1])


def _count(step: _Step, event: Event) -> None:
    match event:
        case Progressed():
            step.processed += event.rows
            step.tokens += event.tokens
        case Committed():
            step.committed += event.rows
            step.dropped |= set(event.dropped)
        case ReplicaStarted():
            step.replicas.add(event.replica)
        case ReplicaLost():
            step.replicas.discard(event.replica)
            step.lost[event.kind] += 1
            # They come through once more.
            step.processed -= event.rollouts
            step.repeated += event.rollouts
        case Quarantined():
            step.quarantined |= event.rollouts
        case Waiting():
            step.windows_waiting = event.windows
        case StepFinished():
            step.end = time.monotonic()
            step.windows_waiting = 0
            step.replicas.clear()


def _progress(step: _Step) -> StepProgress:
    return StepProgress(
        step=step.started.step,
        rows=step.started.rows,
        rows_before=step.started.rows_done,
        committed=step.committed,
        processed=step.processed,
        tokens=step.tokens,
        seconds=(time.monotonic() if step.end is None else step.end) - step.begin,
        finished=step.end is not None,
        dropped=len(step.dropped),
        repeated=step.repeated,
        replicas=len(step.replicas),
        windows_waiting=step.windows_waiting,
        lost=dict(step.lost),
        quarantined=dict(step.quarantined),
    )
