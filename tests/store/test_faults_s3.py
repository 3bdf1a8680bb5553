"""A server that errs, drags, hangs or drops connections: survived where it passes, one clear error where it stays."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import psutil
import pytest

from personaspace.store import open_run, remote
from personaspace.store.errors import StorageError
from personaspace.store.index import write_index
from personaspace.store.lease import LEASE, Fence, acquire, read_holder
from personaspace.store.manifest import read_manifest
from personaspace.store.records import committed_slots, describe, read_records
from personaspace.store.remote import RemoteFolder
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.store import small_runs
from tests.store.fault_proxy import Fault, FaultProxy
from tests.store.small_runs import LAYOUT, commit_coordinates, commit_rollouts, commit_shards, create
from tests.store.storages import PROCESSES, background, contents, fresh_s3, in_threads, settle

PATIENCE = 10.0
"""Seconds that an operation may take to give up, with the timeouts below."""


@pytest.fixture
def folder(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    """A fresh folder behind the proxy, with little patience."""
    monkeypatch.setattr(remote, "REQUEST_TIMEOUT", timedelta(seconds=0.5))
    monkeypatch.setattr(remote, "RETRY_TIMEOUT", timedelta(seconds=0.9))
    return fresh_s3()


def write_all(fence: Fence) -> None:
    """A whole run; what is there already is left as it is."""
    manifest = read_manifest(fence.folder) or create(fence)
    commit_rollouts(fence, LAYOUT, range(LAYOUT.units))
    commit_shards(fence, LAYOUT, small_runs.ALL)
    commit_coordinates(fence, LAYOUT, range(LAYOUT.units))
    write_index(fence, manifest)


def driver(folder: RemoteFolder) -> Fence:
    """The fence of the next driver; an earlier one is over, whatever it could still say to the server."""
    holder = read_holder(folder)
    if holder is not None:
        folder.replace(LEASE, replace(holder, released=True).encode())
    return acquire(folder, timeout=60, say=pytest.fail).fence


def assert_complete(folder: RemoteFolder, epoch: int) -> None:
    np.testing.assert_array_equal(open_run(folder)[RESID_POST_MEAN].values, small_runs.values())
    assert verify(folder, own_epoch=epoch).problems == ()
    assert set(committed_slots(folder).values()) == {0}


def some_are_slow(names: Iterable[str], fast: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


PASSING = {
    "500": Fault(kind="status", status=500, share=0.1),
    "503": Fault(kind="status", status=503, share=0.1),
    "429": Fault(kind="status", status=429, share=0.1),
    "slow": Fault(kind="slow", seconds=0.1, share=0.1),
    "cut": Fault(kind="cut", share=0.1),
    "answers lost": Fault(kind="lose answer", share=0.1),
    "objects half read": Fault(kind="half answer", requests="GET .*/run/", share=0.1),
}


@pytest.mark.parametrize("name", some_are_slow(PASSING, fast=("answers lost",)))
def test_faults_that_pass_are_survived(folder: RemoteFolder, proxy: FaultProxy, name: str) -> None:
    with proxy.failing(replace(PASSING[name])):
        fence = driver(folder)
        write_all(fence)
        assert_complete(folder, fence.epoch)
    assert proxy.struck > 8
    assert_complete(folder, fence.epoch)
    for array in ("rollouts", RESID_POST_MEAN, "coordinates"):
        assert not any(record.adopted for record in read_records(folder, array).values())


def test_silence_that_passes_is_survived(folder: RemoteFolder, proxy: FaultProxy) -> None:
    fence = driver(folder)
    with proxy.failing(Fault(kind="hang", requests="PUT", times=1)):
        write_all(fence)
    assert_complete(folder, fence.epoch)


def test_silence_to_readers_that_passes_is_survived(folder: RemoteFolder, proxy: FaultProxy) -> None:
    fence = driver(folder)
    write_all(fence)
    with proxy.failing(Fault(kind="hang", times=1)):
        assert_complete(folder, fence.epoch)


@pytest.mark.parametrize("operation", ["put_new", "compare_and_swap from nothing", "compare_and_swap", "replace"])
@pytest.mark.parametrize("times", [1, 2])
def test_write_whose_answer_is_lost_has_happened(
    folder: RemoteFolder, proxy: FaultProxy, operation: str, times: int
) -> None:
    if operation == "compare_and_swap":
        folder.replace("a", b"old")
    with proxy.failing(Fault(kind="lose answer", requests="PUT", times=times)):
        answer = {
            "put_new": lambda: folder.put_new("a", b"new"),
            "compare_and_swap from nothing": lambda: folder.compare_and_swap("a", None, b"new"),
            "compare_and_swap": lambda: folder.compare_and_swap("a", b"old", b"new"),
            "replace": lambda: folder.replace("a", b"new") or True,
        }[operation]()
    assert folder.get("a") == b"new"
    # A put that is repeated can't tell its own object from another's: `commit` compares the bytes.
    assert answer is (operation != "put_new")


def test_commit_whose_every_answer_is_lost_once_is_consistent(folder: RemoteFolder, proxy: FaultProxy) -> None:
    """Each put arrives; its answer does not."""
    fence = driver(folder)
    create(fence)
    for unit, group in small_runs.ALL:
        with proxy.failing(
            *[Fault(kind="lose answer", requests=f"PUT .*{part}", times=1) for part in ("/c/", "commits")]
        ):
            commit_shards(fence, LAYOUT, [(unit, group)])
        assert proxy.struck == 2
    for record in read_records(folder, RESID_POST_MEAN).values():
        assert [describe(stored.key, folder.get(stored.key)) for stored in record.objects] == list(record.objects)
        assert not record.adopted
    assert verify(folder, own_epoch=fence.epoch).problems == ()


STAYING = {
    "500": Fault(kind="status", status=500),
    "503": Fault(kind="status", status=503),
    "hang": Fault(kind="hang"),
    "cut": Fault(kind="cut"),
    "403": Fault(kind="status", status=403, body=b"<Error><Code>AccessDenied</Code></Error>"),
}


@pytest.mark.parametrize("name", STAYING)
def test_fault_that_stays_is_one_clear_error_in_time(folder: RemoteFolder, proxy: FaultProxy, name: str) -> None:
    folder.put_new("there", b"old")
    calls: dict[str, Callable[[], Any]] = {
        "there: reading": lambda: folder.get("there"),
        "there: reading it": lambda: folder.exists("there"),
        "new: writing": lambda: folder.put_new("new", b"data"),
        "there: writing": lambda: folder.replace("there", b"data"),
        "there: writing it": lambda: folder.compare_and_swap("there", b"old", b"data"),
        "there: deleting": lambda: folder.delete("there"),
        "run: listing": lambda: list(folder.list()),
        "run: listing it": lambda: folder.children(),
        "run.json: reading": lambda: open_run(folder),
        "lease.json: reading": lambda: acquire(folder, timeout=60, say=print),
    }

    def attempt(number: int) -> tuple[str, float]:
        begin = time.monotonic()
        with pytest.raises(StorageError) as caught:
            list(calls.values())[number]()
        return str(caught.value), time.monotonic() - begin

    with proxy.failing(replace(STAYING[name])):
        answers = in_threads(attempt, len(calls))
    for what, (message, seconds) in zip(calls, answers, strict=True):
        assert seconds < PATIENCE, what
        assert what in message
        assert message.startswith(folder.url)
        assert "Check URL, credentials and network (for S3: AWS_ACCESS_KEY_ID" in message
        assert message.endswith("What is committed is safe; the same command resumes.")
        assert "\n" not in message
    assert contents(folder) == {"there": b"old"}


@pytest.mark.parametrize("name", some_are_slow(STAYING, fast=("hang",)))
def test_server_that_fails_amid_the_work_loses_nothing(folder: RemoteFolder, proxy: FaultProxy, name: str) -> None:
    """From some put on, nothing works any more, twice; then the same work is done."""

    def attempt(number: int) -> None:
        fence = driver(folder)
        proxy.after(number, "PUT .*/run/(activations.*/c/|commits|rollouts)", replace(STAYING[name]))
        write_all(fence)

    for number in (3, 8):
        with pytest.raises(StorageError), proxy.failing():
            attempt(number)
        before = contents(folder, but=(LEASE,))
        assert open_run(folder)[RESID_POST_MEAN].shape == (12, 5, 3)
    fence = driver(folder)
    write_all(fence)
    assert_complete(folder, fence.epoch)
    assert all(folder.get(key) == data for key, data in before.items())


def test_readers_explain_a_server_that_is_gone(folder: RemoteFolder, proxy: FaultProxy) -> None:
    write_all(driver(folder))
    opened = open_run(folder)
    with proxy.failing(Fault(kind="status", status=503)):
        with pytest.raises(StorageError, match=rf"{RESID_POST_MEAN}/c/\d/\d/0: reading .*failed: .*503"):
            opened[RESID_POST_MEAN].load()
        with pytest.raises(StorageError, match="503"):
            verify(folder)
    np.testing.assert_array_equal(opened[RESID_POST_MEAN].values, small_runs.values())


def test_heartbeat_survives_an_outage(folder: RemoteFolder, proxy: FaultProxy) -> None:
    with acquire(folder, timeout=1, say=pytest.fail) as lease:
        with proxy.failing(Fault(kind="status", status=500)):
            time.sleep(0.5)
        beat = folder.get(LEASE)
        deadline = time.monotonic() + 20
        while folder.get(LEASE) == beat:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lease.fence.check()
    assert read_holder(folder).released  # type: ignore[union-attr]


@pytest.mark.parametrize("operation", ["put_new", "replace", "compare_and_swap"])
def test_missing_bucket_is_one_clear_error(proxy: FaultProxy, operation: str) -> None:
    nowhere = RemoteFolder("s3://no-such-bucket/runs/run")
    arguments = (None, b"data") if operation == "compare_and_swap" else (b"data",)
    with pytest.raises(StorageError, match="NoSuchBucket"):
        getattr(nowhere, operation)("a", *arguments)


def fork_after_use(environment: dict[str, str], folder: RemoteFolder, answers: Any) -> None:
    """Read in this process, then in a fork of it."""
    settle(environment)
    folder.put_new("a", b"data")

    def read() -> None:
        try:
            answers.send(folder.get("a"))
        except StorageError as error:
            answers.send(str(error))

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    child.join()


def test_fork_of_a_connected_process_works_or_says_why_not(folder: RemoteFolder) -> None:
    """As the workers of a DataLoader or of a Pool are on Linux.

    Not in this process: without the check in ``remote``, the fork's sockets end up in its parent's epoll, which hangs.
    """
    answers, theirs = PROCESSES.Pipe(duplex=False)
    with background(fork_after_use, dict(os.environ), folder, theirs) as parent:
        came = answers.poll(20)
        for child in psutil.Process(parent.pid).children():
            child.kill()
    assert came
    answer = answers.recv()
    assert answer == b"data" or "forked" in answer
