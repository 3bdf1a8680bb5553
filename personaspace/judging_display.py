"""Renders a judging session: a live display on a terminal, otherwise one plain line every 30 seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from personaspace.extract.judging.progress import JudgingProgress
from personaspace.store.sessions import human_duration

PLAIN_INTERVAL = 30.0
"""Seconds between lines when the output is not a terminal."""


class JudgingDisplay:
    """A context manager that progress is reported to; shows rollouts judged, their rate, the cost and time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("    judge"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rollouts judged · {task.fields[state]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("judge", total=None, state="starting")
        self._last_line = time.monotonic()

    def __enter__(self) -> "JudgingDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def report(self, progress: JudgingProgress) -> None:
        """Show how far it is."""
        state = describe(progress)
        self._bar.update(self._task, total=progress.rows, completed=progress.done, state=state)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._console.print(f"judge: {progress.done}/{progress.rows} rollouts judged, {state}", markup=False)
            self._last_line = time.monotonic()


def describe(progress: JudgingProgress) -> str:
    """Rate, cost, failures and time left."""
    parts = [f"{progress.done / progress.seconds:.1f}/s" if progress.done and progress.seconds else "no answer yet"]
    if progress.spending.usd is not None:
        parts.append(f"{progress.spending.usd + progress.spent_before:,.4g} USD")
    if progress.failed:
        parts.append(f"{progress.failed} requests failed")
    if progress.unread:
        parts.append(f"{progress.unread} answers asked again")
    left = progress.seconds_left
    parts.append("time left unknown" if left is None else f"{human_duration(left)} left")
    return ", ".join(parts)


def summary(name: str, progress: JudgingProgress) -> str:
    """One line on a session that has ended."""
    spending = progress.spending
    cost = "cost unknown" if spending.usd is None else f"{spending.usd:,.4g} USD"
    earlier = f" (and at most {progress.spent_before:,.4g} USD before)" if progress.spent_before else ""
    return (
        f"judge: {name} scored {progress.scored} rollouts, {progress.unjudged} could not be scored, "
        f"{human_duration(progress.seconds)}, {progress.requests} requests ({progress.failed} failed), "
        f"{spending.prompt_tokens:,} + {spending.completion_tokens:,} tokens, {cost}{earlier}"
    )
