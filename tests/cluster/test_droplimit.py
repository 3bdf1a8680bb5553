"""The limit on dropped rollouts: counts each row once, over all steps and sessions, and ends the run with a summary."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.droplimit import DropLimit, TooManyDroppedError
from personaspace.cluster.events import Committed, Event, Note, Progressed, StepFinished, StepStarted, Waiting
from personaspace.cluster.generation import generate
from personaspace.cluster.session import hold_run
from personaspace.store.records import committed_slots
from tests.cluster.small_jobs import config_for, job_of, talk, write_responses
from tests.models import tiny_checkpoint


def committed(dropped: Mapping[int, str]) -> Committed:
    return Committed(rows=4, dropped=dropped)


def ignore(_: Event) -> None:
    """Nobody looks."""


def test_events_pass_on_even_the_one_that_ends_the_run() -> None:
    shown: list[Event] = []
    limit = DropLimit(shown.append, rows=8, share=0.25)
    events = [
        StepStarted(step="generate", rows=8, rows_done=0),
        Note(text="on its way"),
        Progressed(tokens=9, rows=8),
        committed({0: "empty", 1: "empty"}),
        Waiting(),
        StepFinished(step="generate"),
    ]
    for event in events:
        limit.report(event)
    with pytest.raises(TooManyDroppedError):
        limit.report(committed({2: "empty"}))
    assert shown == [*events, committed({2: "empty"})]


def test_a_row_that_both_steps_drop_counts_once() -> None:
    limit = DropLimit(ignore, rows=8, share=0.25)
    limit.report(committed({0: "empty", 1: "too long"}))
    limit.report(StepStarted(step="extract", rows=8, rows_done=4, dropped={0: "empty"}))
    limit.report(committed({1: "too long"}))


def test_what_earlier_sessions_dropped_counts() -> None:
    limit = DropLimit(ignore, rows=8, share=0.25)
    with pytest.raises(TooManyDroppedError, match=r"^3 of 8 rollouts are dropped"):
        limit.report(StepStarted(step="extract", rows=8, rows_done=4, dropped=dict.fromkeys(range(3), "empty")))


@pytest.mark.parametrize(
    ("rows", "share", "allowed"),
    [(8, 0.25, 2), (100, 0.29, 29), (1000, 0.001, 1), (30, 0.1, 3), (7, 0.5, 3), (5, 0, 0)],
)
def test_the_share_itself_is_allowed(rows: int, share: float, allowed: int) -> None:
    limit = DropLimit(ignore, rows=rows, share=share)
    limit.report(committed(dict.fromkeys(range(allowed), "empty")))
    with pytest.raises(TooManyDroppedError, match=rf"^{allowed + 1} of {rows} .* \({share * 100:g}%\)"):
        limit.report(committed({allowed: "empty"}))


def test_a_share_of_one_allows_everything() -> None:
    DropLimit(ignore, rows=8, share=1).report(committed(dict.fromkeys(range(8), "empty")))


def test_the_summary_counts_the_most_frequent_reasons() -> None:
    reasons = {row: f"{row // 2} tokens too many" for row in range(24)} | {24: "empty", 25: "empty", 26: "empty"}
    with pytest.raises(TooManyDroppedError) as ended:
        DropLimit(ignore, rows=100, share=0.1).report(committed(reasons))
    lines = "".join(f"\n  2 x {number} tokens too many" for number in range(9))
    assert str(ended.value) == (
        f"27 of 100 rollouts are dropped, more than extract.max_dropped (10%) allows:\n  3 x empty{lines}\n"
        "  and 3 more reasons\nWhat is committed stays. Mend the cause, or go on with a higher --extract.max-dropped."
    )
    assert ended.value.exit_code == 7


def test_an_import_ends_at_the_limit_each_time_it_is_tried(tmp_path: Path) -> None:
    """What is committed stays, nothing is added to it, and a higher limit goes on from there."""
    answers = {"default": ["One.", "", " ", "Four."], "ghost": ["", "\n", "Seven.", "Eight."]}
    conversations = {role: [talk("?", text) for text in texts] for role, texts in answers.items()}
    responses = write_responses(tmp_path / "responses", conversations)
    config = config_for(tiny_checkpoint(tmp_path / "model"), responses, tmp_path, "run")
    message = (
        "2 of 8 rollouts are dropped, more than extract.max_dropped (20%) allows:\n  1 x the response is empty\n"
        "  1 x the response is only white space\nWhat is committed stays. Mend the cause, or go on with a higher "
        "--extract.max-dropped."
    )

    def attempt(share: float) -> list[Event]:
        events: list[Event] = []
        job = job_of(config)
        limit = DropLimit(events.append, rows=job.layout.rows, share=share)
        with hold_run(job, say=print) as fence:
            generate(job, fence, ClusterConfig(), limit.report)
        return events

    for _ in range(2):
        with pytest.raises(TooManyDroppedError, match=f"^{re.escape(message)}$"):
            attempt(0.2)
        assert list(committed_slots(job_of(config).folder)) == [("rollouts", 0, 0)]
    lost = {1: "the response is empty", 2: "the response is only white space"}
    assert attempt(0.5)[0] == StepStarted(step="generate", rows=8, rows_done=4, dropped=lost)
    assert sorted(committed_slots(job_of(config).folder)) == [("rollouts", 0, 0), ("rollouts", 1, 0)]
