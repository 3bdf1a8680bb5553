"""The timeline: what workers did, in a format that Perfetto reads, of bounded size, with its shares of time."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright

from personaspace.cluster.events import Busy, Loaded, ReplicaLost, ReplicaStarted, Worked
from personaspace.cluster.watching.timeline import (
    Slice,
    Timeline,
    describe_shares,
    join_neighbours,
    replica_occupancy,
    shares,
)
from personaspace.cluster.watching.timeline_page import timeline_page


def worked(batch: int, *busy: tuple[float, float], activity: str = "forward") -> Worked:
    spans = tuple(Busy(activity=activity, start=start, stop=stop) for start, stop in busy)
    return Worked(step="extract", replica=0, batch=f"window 0, micro-batch {batch}", busy=spans)


def timeline() -> Timeline:
    """Two stages, of which the second waits for the first: two micro-batches of 1 s in each, then a commit."""
    line = Timeline()
    workers = tuple(Loaded(node=node, pid=7, seconds=2.0, resident=1) for node in "ab")
    line.report(ReplicaStarted(step="extract", replica=0, workers=workers), 102.0)
    line.report(worked(0, (102, 103), (103, 104)), 104.0)
    line.report(worked(1, (103, 104), (105, 106)), 106.0)
    line.report(worked(0, (106, 106.5), (106, 107), activity="commit"), 107.0)
    lost = ReplicaLost(step="extract", replica=0, reason="its node died", windows=1, rollouts=3)
    line.report(lost, 108.0)
    return line


def named(events: list[dict[str, Any]], name: str) -> dict[tuple[int, int], str]:
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == name}


def test_every_replica_is_a_process_and_every_stage_a_track() -> None:
    document = json.loads(timeline().trace("runs/demo"))
    events = document["traceEvents"]
    assert document["otherData"] == {"title": "runs/demo", "begin": 100.0}
    assert named(events, "process_name") == {(1, 0): "extract replica 0"}
    tracks = named(events, "thread_name")
    whats = ("commit", "forward", "load")
    assert list(tracks.values()) == [f"stage {stage} {what}" for stage in (0, 1) for what in whats]
    slices = {
        (tracks[event["pid"], event["tid"]], event["name"]): (event["ts"] / 1e6, event["dur"] / 1e6)
        for event in events
        if event["ph"] == "X"
    }
    assert slices["stage 1 forward", "window 0, micro-batch 1"] == (5.0, 1.0)
    assert slices["stage 0 commit", "window 0, micro-batch 0"] == (6.0, 0.5)
    assert slices["stage 0 load", "load"] == (0.0, 2.0)
    moments = {event["name"]: event for event in events if event["ph"] == "i"}
    assert moments["ready"]["args"] == {"nodes": ["a", "b"], "pids": [7, 7]}
    assert moments["lost"]["ts"] == 8e6
    assert moments["lost"]["args"]["reason"] == "its node died"


def test_shares_of_time_and_the_bubble() -> None:
    found = shares(timeline().trace(""))
    busy = {(share.stage, share.activity): (share.seconds, share.busy) for share in found}
    assert busy[0, "forward"] == (2.0, 1.0)
    assert busy[1, "forward"] == (2.0, pytest.approx(2 / 3))
    [(replica, idle)] = replica_occupancy(found).items()
    assert replica == ("extract", 0)
    assert idle.idle == idle.bubble == pytest.approx(1 / 6)  # Of stage 0 nothing, of stage 1 a third.
    assert describe_shares(found).splitlines()[-1] == "extract: stages idle 16.7%: bubble 16.7%, uneven stages 0.0%"


@given(st.integers(1, 300), st.integers(2, 20))
def test_a_long_run_stays_small_and_no_work_is_lost(batches: int, most: int) -> None:
    line = Timeline(most_slices=most)
    for batch in range(batches):
        line.report(worked(batch, (2 * batch, 2 * batch + 1), (2 * batch + 1, 2 * batch + 2)), 0.0)
    trace = line.trace("")
    slices = [event for event in json.loads(trace)["traceEvents"] if event["ph"] == "X"]
    assert len(slices) <= most
    for share in shares(trace):
        assert share.pieces == batches
        assert share.seconds == pytest.approx(batches)
        assert share.busy == pytest.approx(batches / (2 * batches - 1))
        assert sum(stop - start for start, stop in share.intervals) == pytest.approx(batches)
    for stage in (0, 1):
        own = sorted((s["ts"], s["ts"] + s["dur"]) for s in slices if s["args"]["stage"] == stage)
        assert all(before[1] <= after[0] for before, after in pairwise(own))


def test_joined_neighbours_are_named_by_first_and_last() -> None:
    pieces = [Slice(name=str(n), start=n, stop=n + 0.5, busy=0.5) for n in range(5)]
    once = join_neighbours(pieces)
    assert [piece.name for piece in once] == ["0 ... 1", "2 ... 3", "4"]
    assert [piece.name for piece in join_neighbours(once)] == ["0 ... 3", "4"]


@pytest.mark.browser
def test_the_page_shows_every_track_in_a_browser(tmp_path: Path) -> None:
    line = timeline()
    line.report(worked(2, (107, 108)), 108.0)
    hostile = ReplicaLost(step="extract", replica=1, reason="<img src=x onerror=alert(1)>", windows=0, rollouts=0)
    line.report(hostile, 109.0)
    (tmp_path / "page.html").write_text(timeline_page(line.trace("runs/<b>demo</b>")))
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        stop = pytest.fail if os.environ.get("PERSONASPACE_REQUIRE_BROWSER") == "1" else pytest.skip
        stop("NO BROWSER: nobody looked at the timeline. Run `apt-get install chromium`.")
    said: list[str] = []
    with sync_playwright() as driver:
        tab = driver.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append(dialog.message))
        tab.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
        tab.goto(f"file://{tmp_path}/page.html")
        tab.wait_for_selector(".ytick")
        rows = tab.locator(".ytick").all_text_contents()
        legend = tab.locator(".legendtext").all_text_contents()
        assert tab.title() == "runs/<b>demo</b>"
    tracks = [f"extract replica 0, stage {stage} {what}" for stage in (0, 1) for what in ("commit", "forward", "load")]
    assert rows[::-1] == ["extract replica 0", *tracks, "extract replica 1"]
    assert legend == ["load", "forward", "commit", "ready", "lost"]
    assert said == []
