"""Renders events: a live display on a terminal, otherwise one plain line every 30 seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from personaspace.cluster.events import (
    Committed,
    Event,
    Note,
    Progressed,
    Quarantined,
    ReplicaLost,
    ReplicaStarted,
    StepFinished,
    StepStarted,
)
from personaspace.store.catalog import human_bytes

PLAIN_INTERVAL = 30.0
"""Seconds between lines when the output is not a terminal."""


class ProgressDisplay:
    """A context manager that events are reported to; shows rows committed, tokens per second and time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rollouts committed · {task.fields[rate]} · {task.fields[eta]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._step = Step("", 0, 0)
        self._last_line = 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def report(self, event: Event) -> None:
        """Take in one event and refresh what is shown."""
        match event:
            case StepStarted():
                self._step = Step(event.step, event.rows, event.rows_done)
                self._task = self._bar.add_task(
                    event.step, total=event.rows, completed=event.rows_done, rate="", eta="starting"
                )
                resumed = f", {event.rows_done} of them done before" if event.rows_done else ""
                self._line(f"{event.step}: {event.rows} rollouts{resumed}", even_live=False)
                return
            case Progressed():
                self._step.advance(event.tokens, event.rows)
            case Committed():
                self._step.committed += event.rows
                self._step.dropped += len(event.dropped)
            case Note():
                self._line(event.text, even_live=True)
                return
            case ReplicaStarted():
                slowest = max(worker.seconds for worker in event.workers)
                held = human_bytes(max(worker.resident for worker in event.workers))
                nodes = len({worker.node for worker in event.workers})
                self._line(
                    f"{event.step}: replica {event.replica} is ready: {len(event.workers)} worker(s) on {nodes} "
                    f"node(s), loaded in {slowest:.1f} s, {held} in the largest",
                    even_live=False,
                )
            case ReplicaLost():
                again = f"; {event.windows} window(s) run again" if event.windows else ""
                self._line(f"{event.step}: lost replica {event.replica}: {event.reason}{again}", even_live=True)
                self._step.repeated += event.rollouts
            case Quarantined():
                for rollout, why in event.rollouts.items():
                    self._line(f"{event.step}: dropped rollout {rollout}: {why}", even_live=True)
            case StepFinished():
                self._line(self._step.summary(), even_live=True)
        self._refresh()

    def _refresh(self) -> None:
        step = self._step
        if self._task is not None:
            self._bar.update(self._task, completed=step.committed, rate=step.rate(), eta=step.eta())
        if time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._line(
                f"{step.name}: {step.committed}/{step.rows} rollouts committed, {step.rate()}, {step.eta()}",
                even_live=False,
            )

    def _line(self, text: str, *, even_live: bool) -> None:
        if even_live or not self._console.is_terminal:
            self._console.print(text, markup=False)
            self._last_line = time.monotonic()


class Step:
    """Counts of the step under way."""

    def __init__(self, name: str, rows: int, rows_done: int) -> None:
        self.name = name
        self.rows = rows
        self.committed = rows_done
        self.dropped = 0
        self.repeated = 0
        """Rollouts that came through and were lost with their replica."""
        self._tokens = 0
        self._processed = rows_done
        self._processed_before = rows_done
        self._start = time.monotonic()

    def advance(self, tokens: int, rows: int) -> None:
        self._tokens += tokens
        self._processed += rows

    def rate(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else "no tokens yet"

    def eta(self) -> str:
        """Time left at the mean pace so far, start-up included."""
        fresh = self._processed - self._processed_before
        if not fresh:
            return "time left unknown"
        left = (time.monotonic() - self._start) * (self.rows - self._processed) / fresh
        return f"{_duration(left)} left"

    def summary(self) -> str:
        seconds = time.monotonic() - self._start
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        again = f", {self.repeated} run again" if self.repeated else ""
        return f"{self.name}: {self.committed} rollouts committed{dropped}{again}, {_duration(seconds)}, {self.rate()}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
