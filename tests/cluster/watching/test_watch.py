"""Watching a run from elsewhere: a real job's metrics at Ray's Prometheus endpoint, and what its folder says."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.cluster import extraction
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event, Progressed, Quarantined, ReplicaLost
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.session import hold_run
from personaspace.cluster.watching.metrics import EXPORTED
from personaspace.cluster.watching.timeline import shares
from personaspace.cluster.watching.watch import Watch
from personaspace.store.errors import StorageError
from personaspace.store.sessions import session_key, trace_key
from personaspace.store.status import read_sessions
from personaspace.store.verify import verify
from tests.cluster.small_jobs import job_for, make_place, talk
from tests.cluster.test_supervisor import saboteur
from tests.cluster.watching.scraping import PATIENCE, scrape

DASHBOARD = Path(__file__).parents[3] / "configs" / "cluster" / "grafana.json"
TALKS = {role: [talk("?", f"{role} {number}.") for number in range(8)] for role in ("default", "ghost")}

pytestmark = pytest.mark.usefixtures("own_ray")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"), TALKS)


def without_series(name: str) -> str:
    """The metric that a series belongs to: histograms have three."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def test_a_watched_job_is_seen_from_everywhere(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extraction, "StageActor", saboteur(place / "killed", times=1))
    job = job_for(place, "watched")
    events: list[Event] = []
    with hold_run(job, say=print) as fence, Watch(job, fence, events.append, interval=0.2) as watch:
        for step in (generate, extract):
            step(job, fence, ClusterConfig(stages=2), watch.report)
        # Real ones take a dozen replicas (test_supervisor.py); this is about what becomes of the event.
        watch.report(Quarantined(step="extract", rollouts={"abc": "quarantined"}))

    [loss] = [event for event in events if isinstance(event, ReplicaLost)]
    assert sum(event.rows for event in events if isinstance(event, Progressed)) == 16 + 16 + loss.rollouts

    # Ray's own endpoint.
    deadline = time.monotonic() + PATIENCE
    while (found := series(scrape())) != set(EXPORTED) and time.monotonic() < deadline:
        time.sleep(1)
    assert found == set(EXPORTED)
    # Runs of other tests are there, too: the cluster lives on.
    lines = [line for line in scrape() if 'run="watched"' in line]
    [lost] = [line for line in lines if line.startswith("ray_personaspace_replicas_lost_total{")]
    assert 'reason="a worker process died"' in lost
    assert all(
        f'{tag}="{value}"' in lost for tag, value in {"run": "watched", "model": "model", "step": "extract"}.items()
    )
    [rollouts] = [line for line in lines if line.startswith("ray_personaspace_rollouts_total{") and "extract" in line]
    # No less; exactly so only from a process that joins its cluster once (test_metrics.py).
    assert float(rollouts.split()[-1]) >= 16 + loss.rollouts
    stages = {re.search(r'stage="(\d)"', line)[1] for line in lines if "busy_seconds" in line and "forward" in line}  # type: ignore[index]
    assert stages == {"0", "1"}

    # The run folder, through the commands.
    [session] = read_sessions(job.folder)
    assert session.outcome == "done"
    assert [(step.step, step.committed, step.finished) for step in session.steps] == [
        ("generate", 16, True),
        ("extract", 16, True),
    ]
    assert session.steps[1].lost == {"a worker process died": 1}
    capsys.readouterr()
    assert main(["status", str(job.folder.url), "--watch"]) == 0  # It is complete, so this ends.
    out = capsys.readouterr().out
    assert re.search(r"^session    1 is done, \d+ s ago$", out, re.M)
    assert re.search(r"^extract    16/16 rollouts \(100%\), [\d,]+ tokens/s, done in ", out, re.M)
    assert re.search(r"^lost       1 replica\(s\): 1 x a worker process died; \d+ rollout\(s\) run again$", out, re.M)
    assert re.search(r"^quarantine 1 rollout\(s\): abc$", out, re.M)
    trace = job.folder.get(trace_key(1))
    assert {(track.replica, track.stage) for track in shares(trace) if track.activity == "forward"} >= {
        (1, 0),
        (1, 1),
    }
    marks = [event for event in json.loads(trace)["traceEvents"] if event["ph"] == "i"]
    assert [mark["name"] for mark in marks] == ["ready", "lost", "ready"]
    assert main(["timeline", str(job.folder.url), "--save", str(place / "trace.json")]) == 0
    assert (place / "trace.json").read_bytes() == trace
    assert f"Open {place / 'trace.json'} in https://ui.perfetto.dev" in capsys.readouterr().out
    assert verify(job.folder).problems == ()


def series(lines: Iterator[str]) -> set[str]:
    return {without_series(re.split(r"[{ ]", line, maxsplit=1)[0]) for line in lines if not line.startswith("#")}


def test_the_dashboard_shows_what_is_exported() -> None:
    text = DASHBOARD.read_text()
    assert {without_series(name) for name in re.findall(r"ray_personaspace_\w+", text)} == set(EXPORTED)
    dashboard = json.loads(text)
    assert dashboard["schemaVersion"] >= 36
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "run"}
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        assert all('{run=~"$run"}' in target["expr"] for target in panel["targets"]), panel["title"]


def test_storage_that_is_away_costs_news_and_nothing_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_for(place, "away")
    replace = type(job.folder).replace
    refused = threading.Event()

    def fail(folder: object, key: str, data: bytes) -> None:
        if key == session_key(1) and not refused.is_set():
            refused.set()
            raise StorageError("the storage is away")
        replace(job.folder, key, data)

    monkeypatch.setattr(type(job.folder), "replace", fail)
    with hold_run(job, say=print) as fence, Watch(job, fence, lambda event: None, interval=0.05) as watch:
        generate(job, fence, ClusterConfig(), watch.report)
        assert refused.wait(10)
    assert [session.outcome for session in read_sessions(job.folder)] == ["done"]


@pytest.mark.parametrize(
    ("error", "outcome", "message"),
    [
        (KeyboardInterrupt("SIGTERM"), "interrupted", ""),
        (StorageError("no room\nmore"), "failed", "no room"),
        (ValueError("a bug"), "failed", "ValueError: a bug"),
    ],
)
def test_how_a_session_ended_is_its_last_word(place: Path, error: BaseException, outcome: str, message: str) -> None:
    job = job_for(place, f"ended-{type(error).__name__}")
    with pytest.raises(type(error)), hold_run(job, say=print) as fence, Watch(job, fence, lambda event: None):
        raise error
    [session] = read_sessions(job.folder)
    assert (session.outcome, session.message) == (outcome, message)
