"""A small run as a driver and its writers carry it out, in processes and without Ray: what the kill trials kill.

The driver holds the lease, creates the run, adopts what a crash left, and commits each unit's coordinates once all
its shards have records. Its writers, as a driver's actors, share the lease's epoch: each generates the rollouts of
some units, and then commits the shards of its own layer groups.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from personaspace.store.commit import adopt, commit
from personaspace.store.creation import refuse_foreign, write_run
from personaspace.store.errors import IntegrityError
from personaspace.store.index import write_index
from personaspace.store.layout import ZARR_GROUP, Layout, rollouts_key, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.manifest import read_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, committed_slots, describe
from personaspace.store.rollouts import decode_rollouts, encode_rollouts
from personaspace.store.schema import RESID_POST_MEAN, decode_shard, encode_shard
from tests.store import small_runs
from tests.store.hooks import hooked

EMPTY = "the response is empty"
DRIVER = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """One process kills itself and all others between the publish of an object and its record."""

    process: int
    """Index of the writer, or DRIVER."""
    record: int
    """Which of its records is never written, from 1."""

    def __str__(self) -> str:
        return f"{'driver' if self.process == DRIVER else 'writer'} before its record {self.record}"


def dropped_rows(layout: Layout) -> set[int]:
    """Rows without a usable response."""
    return {row for row in layout.planned_rows() if row % 11 == 5}


@cache
def values(layout: Layout) -> NDArray[np.float32]:
    """What the run's array holds in the end, ``(rows with padding, layers, hidden)``."""
    made = small_runs.values(layout)
    made[sorted(dropped_rows(layout))] = np.nan
    return made


@cache
def rollouts_part(layout: Layout, unit: int) -> bytes:
    rows, dropped = layout.unit_row_range(unit), dropped_rows(layout)
    parts = [small_runs.rollout(row) for row in small_runs.planned(layout) if row.row in rows]
    return encode_rollouts([replace(part, dropped=EMPTY if part.row in dropped else None) for part in parts])


def shard(layout: Layout, unit: int, group: int) -> bytes:
    layers = layout.group_layers(group)
    return encode_shard(values(layout)[layout.unit_slice(unit), layers.start : layers.stop], layout, "lossless")


def reasons(layout: Layout, unit: int) -> dict[int, str]:
    rows = layout.unit_row_range(unit)
    return {row: EMPTY for row in sorted(dropped_rows(layout)) if row in rows}


def inspect_rollouts(layout: Layout, unit: int, data: bytes) -> Mapping[int, str]:
    entries = decode_rollouts(data).select(["row", "dropped"]).to_pylist()
    if [entry["row"] for entry in entries] != list(layout.unit_row_range(unit)):
        raise IntegrityError("other rollouts than planned")
    return {entry["row"]: entry["dropped"] for entry in entries if entry["dropped"] is not None}


def inspect_shard(layout: Layout, unit: int, group: int, data: bytes) -> Mapping[int, str]:
    found = np.isfinite(decode_shard(data, layout, len(layout.group_layers(group))))
    wanted = [row in layout.unit_row_range(unit) and row not in dropped_rows(layout) for row in unit_rows(layout, unit)]
    if not np.array_equal(found.any((1, 2)), wanted) or not np.array_equal(found.all((1, 2)), wanted):
        raise IntegrityError("other rows than planned")
    return reasons(layout, unit)


def unit_rows(layout: Layout, unit: int) -> range:
    rows = layout.unit_slice(unit)
    return range(rows.start, rows.stop)


def drive(folder: Folder, layout: Layout, writers: int, ready: Connection, crash: Crash | None = None) -> None:
    """Begin or resume the run with so many writers, in a process group of their own, until all is committed."""
    os.setpgid(0, 0)
    # Forked before this process has any connection, which a fork could not use.
    processes = multiprocessing.get_context("fork")
    begin = [processes.Pipe(duplex=False) for _ in range(writers)]
    started = [
        processes.Process(target=_write, args=(_aimed(folder, crash, index), layout, index, writers, begin[index][0]))
        for index in range(writers)
    ]
    for process in started:
        process.start()
    ready.send("ready")
    try:
        refuse_foreign(folder)
        with acquire(_aimed(folder, crash, DRIVER), timeout=60, say=print) as lease:
            fence = lease.fence
            stored = read_manifest(folder)
            planned = stored or small_runs.small_manifest(layout, sessions=())
            session = {**small_runs.small_manifest().sessions[0], "epoch": lease.epoch}
            manifest = write_run(
                fence, stored, replace(planned, sessions=(*planned.sessions, session)), small_runs.planned(layout)
            )
            adopt_orphans(fence, layout)
            for _, sender in begin:
                sender.send(lease.epoch)
            _commit_coordinates(fence, layout, started)
            for process in started:
                process.join()
                assert process.exitcode == 0, process.exitcode
            write_index(fence, manifest)
            folder.clear_scratch()
    except BaseException:
        ready.send(traceback.format_exc())
        os.killpg(0, signal.SIGKILL)
    ready.send("done")


def adopt_orphans(fence: Fence, layout: Layout) -> None:
    """Record what a crash left without a record, as cluster/generation.py and cluster/extraction.py do."""
    done = committed_slots(fence.folder)
    present = {
        entry.key for prefix in (ROLLOUTS, f"{ZARR_GROUP}/{RESID_POST_MEAN}/c") for entry in fence.folder.list(prefix)
    }
    for unit in range(layout.units):
        rows = layout.unit_row_range(unit)
        if (ROLLOUTS, unit, 0) not in done and rollouts_key(unit) in present:
            adopt(
                fence,
                (ROLLOUTS, unit, 0),
                rollouts_key(unit),
                rows=rows,
                inspect=partial(inspect_rollouts, layout, unit),
            )
        for group in range(layout.groups):
            slot, key = (RESID_POST_MEAN, unit, group), shard_key(RESID_POST_MEAN, unit, group)
            if slot not in done and key in present:
                inspect = partial(inspect_shard, layout, unit, group)
                adopt(fence, slot, key, rows=rows, inspect=inspect, source=_source(layout, unit))


def records_of(layout: Layout, process: int, writers: int) -> int:
    """How many records a process commits in an undisturbed run."""
    if process == DRIVER:
        return layout.units
    return len(range(process, layout.units, writers)) + layout.units * len(_own_groups(layout, process, writers))


def _own_groups(layout: Layout, index: int, writers: int) -> range:
    bounds = layout.stage_boundaries(writers)
    return range(bounds[index] // layout.layer_group, -(-bounds[index + 1] // layout.layer_group))


def _write(folder: Folder, layout: Layout, index: int, writers: int, begin: Connection) -> None:
    fence = Fence(folder, begin.recv())
    done = committed_slots(folder)
    for unit in range(index, layout.units, writers):
        if (ROLLOUTS, unit, 0) not in done:
            commit(
                fence,
                (ROLLOUTS, unit, 0),
                {rollouts_key(unit): rollouts_part(layout, unit)},
                rows=layout.unit_row_range(unit),
                dropped=reasons(layout, unit),
                inspect=partial(inspect_rollouts, layout, unit),
            )
    for unit in range(layout.units):
        _wait_for(folder, (ROLLOUTS, unit, 0))
        for group in _own_groups(layout, index, writers):
            if (RESID_POST_MEAN, unit, group) not in done:
                commit(
                    fence,
                    (RESID_POST_MEAN, unit, group),
                    {shard_key(RESID_POST_MEAN, unit, group): shard(layout, unit, group)},
                    rows=layout.unit_row_range(unit),
                    dropped=reasons(layout, unit),
                    source=_source(layout, unit),
                    inspect=partial(inspect_shard, layout, unit, group),
                )


def _commit_coordinates(fence: Fence, layout: Layout, writers: list[multiprocessing.context.ForkProcess]) -> None:
    waiting = [
        unit for unit in range(layout.units) if (COORDINATES_RECORD, unit, 0) not in committed_slots(fence.folder)
    ]
    while waiting:
        done = committed_slots(fence.folder)
        for unit in list(waiting):
            shards = [(RESID_POST_MEAN, unit, group) for group in range(layout.groups)]
            if all(slot in done for slot in shards):
                commit(
                    fence,
                    (COORDINATES_RECORD, unit, 0),
                    small_runs.coordinates(layout, unit, dropped_rows(layout)),
                    rows=layout.unit_row_range(unit),
                    dropped=reasons(layout, unit),
                    source=_source(layout, unit),
                    covers=tuple(f"{RESID_POST_MEAN}.{group:03d}" for group in range(layout.groups)),
                )
                waiting.remove(unit)
        failed = [writer.exitcode for writer in writers if writer.exitcode]
        assert not failed, failed
        time.sleep(0.01)


def _wait_for(folder: Folder, slot: tuple[str, int, int]) -> None:
    while slot not in committed_slots(folder, slot[1]):
        time.sleep(0.01)


def _source(layout: Layout, unit: int) -> str:
    return describe("", rollouts_part(layout, unit)).sha256


def _aimed(folder: Folder, crash: Crash | None, process: int) -> Folder:
    """The folder, through which a process kills all of them at the record that ``crash`` names."""
    if crash is None or crash.process != process:
        return folder
    records = 0

    def before(operation: str, key: str) -> None:
        nonlocal records
        if operation == "put_new" and key.startswith("commits/"):
            records += 1
            if records == crash.record:
                os.killpg(0, signal.SIGKILL)

    return hooked(folder, before)
