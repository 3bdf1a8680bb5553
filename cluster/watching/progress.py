"""Renders events: a live display on a terminal, otherwise one plain line every 30 seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from personaspace.cluster.events import (
    Event,
    Note,
    Quarantined,
    ReplicaLost,
    ReplicaStarted,
    StepFinished,
    StepStarted,
)
from personaspace.cluster.watching.tally import Tally
from personaspace.store.catalog import human_bytes
from personaspace.store.sessions import StepProgress, human_duration

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
        self._tally = Tally()
        self._last_line = 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def report(self, event: Event) -> None:
        """Take in one event and refresh what is shown."""
        self._tally.report(event)
        match event:
            case StepStarted():
                self._task = self._bar.add_task(
                    event.step, total=event.rows, completed=event.rows_done, rate="", eta="starting"
                )
                resumed = f", {event.rows_done} of them done before" if event.rows_done else ""
                self._line(f"{event.step}: {event.rows} rollouts{resumed}", even_live=False)
                return
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
            case Quarantined():
                for rollout, why in event.rollouts.items():
                    self._line(f"{event.step}: dropped rollout {rollout}: {why}", even_live=True)
            case StepFinished():
                self._line(summary(self._tally.step), even_live=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._task is None:
            return
        step = self._tally.step
        self._bar.update(self._task, completed=step.committed, rate=step.rate_text, eta=step.left_text)
        if time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._line(
                f"{step.step}: {step.committed}/{step.rows} rollouts committed, {step.rate_text}, {step.left_text}",
                even_live=False,
            )

    def _line(self, text: str, *, even_live: bool) -> None:
        if even_live or not self._console.is_terminal:
            self._console.print(text, markup=False)
            self._last_line = time.monotonic()


def summary(step: StepProgress) -> str:
    """One line on a step that is complete."""
    dropped = f", {step.dropped} dropped" if step.dropped else ""
    again = f", {step.repeated} run again" if step.repeated else ""
    return (
        f"{step.step}: {step.committed} rollouts committed{dropped}{again}, {human_duration(step.seconds)}, "
        f"{step.rate_text}"
    )
