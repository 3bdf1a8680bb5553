"""A writer that sleeps at any step, while another driver takes over and works, commits nothing wrong when it wakes."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from personaspace.store import open_run
from personaspace.store.creation import write_run
from personaspace.store.index import INDEX, TABLE, write_index
from personaspace.store.lease import LEASE, Fence, acquire, read_holder
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST_COPY, read_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import committed_slots, describe, read_record, record_key
from personaspace.store.removal import collect_garbage, garbage
from personaspace.store.verify import verify
from tests.store import small_runs
from tests.store.hooks import hooked
from tests.store.sleepers import KEY, SCENES, SLOT, Scene, Sleeper, check, first_driver, outcome, take_over, whole
from tests.store.small_runs import create, grow
from tests.store.storages import LOCAL_FIRST, PROCESSES, contents, settle


def interleave(folder: Folder, scene: Scene, sleep: int, wake: int) -> bool:
    """The first writer sleeps before its operation ``sleep`` until the next driver's operation ``wake``.

    Returns whether that came. Raises AssertionError if the result is wrong.
    """
    scene.prepare(first_driver(folder))
    first = Sleeper(folder, lambda fence: scene.commit(fence, whole(b"first")), sleep)
    if first.asleep_before is None:
        return False
    count, met = itertools.count(1), []

    def before(*_: str) -> None:
        if next(count) == wake:
            met.append(first.wake())

    record = scene.commit(Fence(hooked(folder, before), take_over(folder).epoch), whole(b"second"))
    check(folder, scene, first.wake(), record)
    return bool(met)


@LOCAL_FIRST
@pytest.mark.parametrize("name", SCENES)
def test_every_interleaving_of_two_writers_is_safe(storage: Folder, name: str) -> None:
    """Exhaustive on local disk, a random part elsewhere."""
    everything = [(sleep, wake) for sleep in range(1, 11) for wake in range(1, 12)]
    is_local = type(storage) is LocalFolder
    met = 0
    for sleep, wake in everything if is_local else random.Random(name).sample(everything, 25):
        met += interleave(storage.child(f"{sleep}-{wake}"), SCENES[name], sleep, wake)
    assert met > (30 if is_local else 3)


RECORD = record_key(SLOT, 0)


@LOCAL_FIRST
@pytest.mark.parametrize("then", [("get", LEASE), ("get", KEY), ("delete", RECORD)], ids=" ".join)
def test_writer_that_sleeps_again_after_its_late_record_is_safe(storage: Folder, then: tuple[str, str]) -> None:
    """It wakes before the next driver's n-th operation, sleeps before ``then``, and wakes again before the m-th."""
    scene, met = SCENES["orphan, no inspection"], 0
    for number, (wake, again) in enumerate(itertools.combinations(range(1, 13), 2)):
        folder = storage.child(f"run-{number}")
        scene.prepare(first_driver(folder))
        first = Sleeper(folder, lambda fence: scene.commit(fence, whole(b"first")), ("put_new", RECORD))
        count = itertools.count(1)

        def before(*_: str, first: Sleeper = first, count: Iterator[int] = count, at: Any = (wake, again)) -> None:
            operation = next(count)
            if operation in at:
                first.wake(until=then if operation == at[0] else None)

        record = scene.commit(Fence(hooked(folder, before), take_over(folder).epoch), whole(b"second"))
        met += first.asleep_before is None
        newest = committed_slots(folder)[SLOT]
        first.wake()
        assert committed_slots(folder)[SLOT] == newest
        assert record == read_record(folder, SLOT, newest)
        assert record.objects == (describe(KEY, folder.get(KEY)),)
        assert first.late in ("fenced out", record)
    assert met > 10


def test_writer_that_wakes_after_a_gc_records_nothing_that_is_gone(storage: Folder) -> None:
    fence = first_driver(storage)
    create(fence)
    place = ("put_new", record_key(SLOT, 0))
    sleeper = Sleeper(storage, lambda fence: small_runs.commit_shards(fence, small_runs.LAYOUT, [(0, 0)]), place)
    assert sleeper.asleep_before == place
    second = take_over(storage)
    collect_garbage(second, garbage(storage, verify(storage, own_epoch=second.epoch)))
    sleeper.wake()
    assert verify(storage, own_epoch=second.epoch).harmful == []


def test_driver_that_wakes_leaves_the_copy_of_run_json_alone(storage: Folder) -> None:
    made = create(first_driver(storage))
    again = replace(made, sessions=(*made.sessions, {**made.sessions[0], "epoch": 1}))
    place = ("compare_and_swap", MANIFEST_COPY)
    sleeper = Sleeper(storage, lambda fence: write_run(fence, made, again, small_runs.planned()), place)
    assert sleeper.asleep_before == place
    grown = grow(take_over(storage), again, 5)
    sleeper.wake()
    assert read_manifest(storage) == grown
    assert read_manifest(storage, MANIFEST_COPY) == grown


@pytest.mark.parametrize("sleeps_before", [INDEX, TABLE])
def test_late_index_is_left_aside_by_readers(storage: Folder, sleeps_before: str) -> None:
    fence = first_driver(storage)
    made = create(fence)
    small_runs.complete(fence, units=[0])
    sleeper = Sleeper(storage, lambda fence: write_index(fence, made), ("replace", sleeps_before))
    assert sleeper.asleep_before == ("replace", sleeps_before)
    second = take_over(storage)
    small_runs.complete(second, units=[1])
    write_index(second, made)
    sleeper.wake()
    assert open_run(storage)["status"].values.tolist() == [1] * 8 + [0] * 4


STEPS = {
    "before the first fence check": ("get", LEASE, 1),
    "before the publish's fence check": ("get", LEASE, 2),
    "between fence check and put": ("put_new", KEY, 1),
    "between put and the record's fence check": ("get", LEASE, 3),
    "between fence check and record": ("put_new", record_key(SLOT, 0), 1),
    "between fence check and swap": ("compare_and_swap", KEY, 1),
}


def stop_at(step: str, scene: Scene, fence: Fence, answers: Any, environment: dict[str, str]) -> None:
    settle(environment)
    wanted, seen = STEPS[step], 0

    def before(operation: str, key: str) -> None:
        nonlocal seen
        seen += (operation, key) == wanted[:2]
        if (operation, key, seen) == wanted:
            os.kill(os.getpid(), signal.SIGSTOP)

    answers.send(outcome(lambda: scene.commit(Fence(hooked(fence.folder, before), fence.epoch), whole(b"first"))))


@LOCAL_FIRST
@pytest.mark.parametrize("wakes", ["before the next driver's commit", "after it"])
@pytest.mark.parametrize("step", STEPS)
def test_stopped_process_that_wakes_after_a_takeover_commits_nothing_wrong(
    storage: Folder, step: str, wakes: str
) -> None:
    scene = SCENES["damaged orphan" if "swap" in step else "nothing there"]
    fence = first_driver(storage)
    scene.prepare(fence)
    answers, theirs = PROCESSES.Pipe(duplex=False)
    writer = PROCESSES.Process(target=stop_at, args=(step, scene, fence, theirs, dict(os.environ)))
    writer.start()
    try:
        _wait_until(lambda: psutil.Process(writer.pid).status() == psutil.STATUS_STOPPED)
        # As if the stopped driver were on another host; of this one's, the lease waits for the end.
        holder = read_holder(storage)
        assert holder is not None
        storage.replace(LEASE, replace(holder, pid_space="another boot/pid:[1]").encode())
        second = acquire(storage, timeout=0.2, say=lambda text: None).fence
        if wakes == "after it":
            scene.commit(second, whole(b"second"))
        os.kill(writer.pid, signal.SIGCONT)
        assert answers.poll(30)
        late = answers.recv()
    finally:
        writer.kill()
        writer.join()
    before = {key: data for key, data in contents(storage).items() if key.startswith("commits/")}
    record = scene.commit(second, whole(b"second"))
    assert all(storage.get(key) == data for key, data in before.items())
    check(storage, scene, late, record)
    # It may have published before its record was refused, or recorded before anybody else had: both are whole.
    assert storage.get(KEY) in (whole(b"first"), whole(b"second"))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
