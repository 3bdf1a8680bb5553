"""What drivers say of their sessions, and what `status` makes of it: progress, pace, losses, and a driver that died."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from personaspace.cli import main
from personaspace.store.catalog import describe, summarize
from personaspace.store.copying import copy_run
from personaspace.store.freeze import content_hash
from personaspace.store.lease import LEASE, Fence, Holder, acquire, read_holder
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.removal import collect_garbage, garbage
from personaspace.store.sessions import (
    SessionProgress,
    StepProgress,
    human_duration,
    is_session_key,
    read_session,
    session_epochs,
    session_key,
    trace_key,
    write_session,
)
from personaspace.store.status import describe_progress, read_sessions
from personaspace.store.verify import verify
from tests.store.small_runs import complete, create

STEP = StepProgress(
    step="extract", rows=100, rows_before=20, committed=50, processed=40, tokens=8_000, seconds=10.0, replicas=2
)


@contextmanager
def driver(folder: Folder) -> Iterator[Fence]:
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        yield lease.fence


@pytest.fixture
def run(tmp_path: Path) -> LocalFolder:
    folder = LocalFolder(tmp_path / "runs" / "a")
    with driver(folder) as fence:
        create(fence)
        complete(fence, units=[0])
    return folder


def test_pace_and_time_left() -> None:
    assert STEP.tokens_per_second == 800
    assert STEP.seconds_left == 10.0  # 40 in 10 s, and 40 are left.
    assert (STEP.rate_text, STEP.left_text) == ("800 tokens/s", "10 s left")
    begun = replace(STEP, processed=0, tokens=0)
    assert (begun.rate_text, begun.left_text) == ("no tokens yet", "time left unknown")
    assert [human_duration(seconds) for seconds in (-1, 59.4, 61, 7261)] == ["0 s", "59 s", "1 min 01 s", "2 h 01 min"]


def test_what_is_written_is_read(storage: Folder) -> None:
    said = SessionProgress(epoch=3, written=5.0, outcome="failed", message="no room", steps=(STEP,))
    write_session(storage, said)
    storage.replace(trace_key(3), b"{}")
    assert read_sessions(storage) == [said]
    keys = [entry.key for entry in storage.list()]
    assert keys == [session_key(3), trace_key(3)]
    assert (session_epochs(keys), session_epochs(keys, traces=True)) == ([3], [3])
    assert all(map(is_session_key, keys))
    assert not is_session_key("sessions/notes.json")


def test_status_of_a_run_in_any_storage(storage: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with driver(storage) as fence:
        create(fence)
        complete(fence, units=[0])
    write_session(storage, SessionProgress(epoch=1, written=time.time(), outcome="interrupted", steps=(STEP,)))
    assert main(["status", storage.url]) == 0
    out = capsys.readouterr().out
    assert "state      partial" in out
    assert "session    1 was interrupted, " in out
    assert "extract    50/100 rollouts (50%), 800 tokens/s" in out


def test_status_tells_progress_and_all_losses(run: LocalFolder) -> None:
    earlier = replace(STEP, lost={"its node died": 1}, repeated=4, quarantined={"abc": "why"})
    now = replace(STEP, lost={"its node died": 1, "a worker process died": 1}, repeated=3, dropped=2, windows_waiting=7)
    with driver(run) as fence:
        assert fence.epoch == 2
        write_session(run, SessionProgress(epoch=1, written=0.0, outcome="failed", message="x", steps=(earlier,)))
        write_session(run, SessionProgress(epoch=2, written=time.time(), outcome="running", steps=(now,)))
        lines = describe_progress(summarize(run), read_sessions(run)).splitlines()
    assert lines == [
        "session    2 is under way; its driver last spoke 0 s ago",
        "extract    50/100 rollouts (50%), 2 dropped, 800 tokens/s, 10 s left; 2 replica(s) at work, 7 window(s) wait",
        "lost       3 replica(s): 2 x its node died, 1 x a worker process died; 7 rollout(s) run again",
        "quarantine 1 rollout(s): abc",
    ]


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("done", "1 is done, 1 min 00 s ago"),
        ("interrupted", "1 was interrupted, 1 min 00 s ago"),
        ("failed", "1 failed 1 min 00 s ago: a reason"),
        ("running", "1 ended without a word: its driver died. It was last heard of 1 min 00 s ago"),
    ],
)
def test_status_tells_how_the_last_session_ended(run: LocalFolder, outcome: str, said: str) -> None:
    message = "a reason" if outcome == "failed" else ""
    write_session(run, SessionProgress(epoch=1, written=time.time() - 60, outcome=outcome, message=message))  # type: ignore[arg-type]
    assert describe_progress(summarize(run), read_sessions(run)) == f"session    {said}"


def test_a_driver_that_was_killed_is_gone_and_one_elsewhere_falls_silent(run: LocalFolder) -> None:
    code = (
        "import sys, time; from personaspace.store.lease import acquire; from personaspace.store.location import "
        "open_folder; acquire(open_folder(sys.argv[1]), timeout=60, say=print); print('held', flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    write_session(run, SessionProgress(epoch=2, written=time.time(), outcome="running"))
    assert f"pid {holder.pid}, epoch 2, running, last sign of life" in describe(summarize(run))
    assert "2 is under way" in describe_progress(summarize(run), read_sessions(run))
    holder.kill()
    holder.wait()
    assert f"pid {holder.pid}, epoch 2, gone, last sign of life" in describe(summarize(run))
    assert "2 ended without a word: its driver died" in describe_progress(summarize(run), read_sessions(run))

    def elsewhere(silence: float) -> Holder:
        me = psutil.Process()
        return Holder(
            epoch=3,
            host="node-7",
            pid_space="elsewhere",
            pid=os.getpid(),
            started=me.create_time(),
            heartbeat=time.time() - silence,
        )

    run.replace(LEASE, elsewhere(silence=5).encode())
    assert "node-7 pid" in describe(summarize(run))
    assert ", epoch 3, running, last sign of life 5 s ago" in describe(summarize(run))
    run.replace(LEASE, elsewhere(silence=300).encode())
    assert ", epoch 3, silent, probably gone, last sign of life 300 s ago" in describe(summarize(run))
    found = read_holder(run)
    assert found is not None
    assert not found.has_ended()


def test_sessions_are_no_part_of_what_a_run_holds(run: LocalFolder, tmp_path: Path) -> None:
    before = content_hash(run, require_manifest(run))
    write_session(run, SessionProgress(epoch=1, written=0.0, outcome="done", steps=(STEP,)))
    run.replace(trace_key(1), b"{}")
    assert content_hash(run, require_manifest(run)) == before
    assert verify(run).problems == ()
    with driver(LocalFolder(tmp_path / "copy")) as fence:
        copy_run(run, fence, lambda *_: None)
        assert [entry.key for entry in fence.folder.list("sessions")] == []


def test_a_damaged_word_costs_no_data_and_gc_deletes_it(run: LocalFolder) -> None:
    write_session(run, SessionProgress(epoch=1, written=0.0, outcome="done", steps=(STEP,)))
    data = bytearray(run.get(session_key(1)))
    data[20] ^= 1
    run.replace(session_key(1), bytes(data))
    assert read_session(run, 1) is None
    assert read_sessions(run) == []
    found = verify(run)
    [problem] = found.problems
    assert (problem.kind, problem.key) == ("leftover", session_key(1))
    assert found.harmful == []
    with driver(run) as fence:
        collect_garbage(fence, garbage(run, verify(run, own_epoch=fence.epoch)))
    assert verify(run).problems == ()


def test_status_watch_ends_when_the_run_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = LocalFolder(tmp_path / "runs" / "whole")
    with driver(folder) as fence:
        create(fence)
        complete(fence)
    assert main(["status", str(folder.path), "--watch"]) == 0
    assert "state      complete" in capsys.readouterr().out


def test_without_a_timeline_the_command_says_so(run: LocalFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(run.path)]) == 2
    assert "no timeline; it has none. A session that ran workers leaves one." in capsys.readouterr().err
