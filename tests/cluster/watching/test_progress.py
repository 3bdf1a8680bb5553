"""What a user sees while a run is under way."""

import io

import pytest
from rich.console import Console

from personaspace.cluster.events import Committed, Note, Progressed, StepFinished, StepStarted, Waiting
from personaspace.cluster.watching import progress
from personaspace.cluster.watching.progress import ProgressDisplay


def show(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, seconds_per_event: float) -> str:
    clock = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * seconds_per_event)
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=140, soft_wrap=True, highlight=False)
    with ProgressDisplay(console) as display:
        display.report(StepStarted(step="extract", rows=100, rows_done=20))
        display.report(Note(text="extract: 2 replicas"))
        for number in range(8):
            display.report(Progressed(tokens=500, rows=10))
            display.report(Committed(rows=10, dropped={number: "the response is empty"}))
        display.report(StepFinished(step="extract"))
    return output.getvalue()


def test_plain_lines_every_half_minute_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = show(monkeypatch, terminal=False, seconds_per_event=4.0).splitlines()
    assert lines[0] == "extract: 100 rollouts, 20 of them done before"
    assert lines[1] == "extract: 2 replicas"
    assert "rollouts committed" in lines[2]
    assert "tokens/s" in lines[2]
    assert lines[2].endswith("left")
    assert lines[-1].startswith("extract: 100 rollouts committed, 8 dropped, ")
    assert 3 < len(lines) < 12


def test_quick_steps_print_no_line_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(show(monkeypatch, terminal=False, seconds_per_event=0.01).splitlines()) == 3


def test_a_line_appears_even_if_no_worker_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    with ProgressDisplay(Console(file=output, width=140)) as display:
        display.report(StepStarted(step="generate", rows=10, rows_done=0))
        for _ in range(20):
            display.report(Waiting())
    assert "generate: 0/10 rollouts committed, no tokens yet, time left unknown" in output.getvalue()


def test_live_display_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = show(monkeypatch, terminal=True, seconds_per_event=4.0)
    assert "rollouts committed" in text
    assert "100/100" in text
