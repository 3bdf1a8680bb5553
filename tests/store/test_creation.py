"""Creating and growing a run: whatever write is the last one, the run is what it was, and the repetition succeeds."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import xarray as xr
import zarr

from personaspace.store import open_run
from personaspace.store.creation import refuse_foreign, run_metadata, write_run
from personaspace.store.errors import InputError, LeaseError
from personaspace.store.layout import ZARR_GROUP
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, Manifest, read_manifest, require_manifest
from personaspace.store.plan import read_plan
from personaspace.store.records import committed_slots, read_object
from personaspace.store.schema import ArraySpec
from tests.store.small_runs import ALL, LAYOUT, MEAN, OK, PAD, complete, create, planned, small_manifest, values


class WatchedFolder(LocalFolder):
    """Calls ``moment`` before every write."""

    __slots__ = ()
    moment: ClassVar[Callable[[], None]]

    def put_new(self, key: str, data: bytes) -> bool:
        type(self).moment()
        return LocalFolder.put_new(self, key, data)

    def replace(self, key: str, data: bytes) -> None:
        type(self).moment()
        LocalFolder.replace(self, key, data)

    def compare_and_swap(self, key: str, expected: bytes | None, data: bytes) -> bool:
        type(self).moment()
        return LocalFolder(self.path).compare_and_swap(key, expected, data)


def watched(fence: Fence, moment: Callable[[], None]) -> Fence:
    """The fence of a folder that calls ``moment`` between any two steps."""
    WatchedFolder.moment = staticmethod(moment)  # type: ignore[assignment]
    return Fence(WatchedFolder(Path(fence.folder.url)), fence.epoch)


def crash_at(step: int) -> Callable[[], None]:
    """Dies at the given moment."""
    steps = itertools.count()

    def moment() -> None:
        if next(steps) == step:
            raise KeyboardInterrupt

    return moment


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


def state(fence: Fence) -> dict[str, bytes]:
    return {entry.key: fence.folder.get(entry.key) for entry in fence.folder.list() if entry.key != "lease.json"}


def assert_readable(fence: Fence, manifest: Manifest, *, filled: int) -> None:
    """The run is as ``manifest`` says, with ``filled`` units; plain Zarr and xarray open it without a warning."""
    layout = manifest.layout
    assert read_manifest(fence.folder) == manifest
    assert read_plan(fence.folder, manifest) == planned(layout)
    run = open_run(fence.folder)
    assert run.sizes == {"rollout": layout.padded_rows, "layer": layout.layers, "hidden": layout.hidden}
    expected = values(layout)
    expected[filled * layout.unit_rows :] = np.nan
    np.testing.assert_array_equal(run["resid_post_mean"].values, expected)
    assert (run["status"].values == OK).sum() == np.isfinite(expected[:, 0, 0]).sum()


def assert_plain_readers_open_it(fence: Fence, rows: set[int]) -> None:
    path = Path(fence.folder.url) / ZARR_GROUP
    if not (path / "zarr.json").exists():
        return
    group = zarr.open_group(path, mode="r")
    assert group["resid_post_mean"].shape[0] in rows
    dataset = xr.open_zarr(path)
    assert dataset.sizes["rollout"] in rows
    assert np.isfinite(dataset["resid_post_mean"].load().values).any(axis=(1, 2)).sum() in (0, 10, 13)


def grown(before: Manifest) -> Manifest:
    layout = before.layout.grow(3)
    return replace(
        before, layout=layout, unit_order=tuple(range(layout.units)), sessions=(*before.sessions, {"epoch": 2})
    )


def test_a_new_run(fence: Fence) -> None:
    refuse_foreign(fence.folder)
    manifest = create(fence)
    assert_readable(fence, manifest, filled=0)
    assert [stored.key for stored in manifest.plan] == ["plan/000000.parquet"]
    assert {stored.key: read_object(fence.folder, stored) for stored in manifest.metadata} == run_metadata(manifest)
    assert fence.folder.get(MANIFEST) == fence.folder.get(MANIFEST_COPY) == manifest.encode()
    root = json.loads(fence.folder.get(f"{ZARR_GROUP}/zarr.json"))
    assert root["attributes"] == {"identity_hash": manifest.identity_hash}
    assert set(state(fence)) == {
        MANIFEST,
        MANIFEST_COPY,
        ".lock",
        "plan/000000.parquet",
        "plan/000000.copy.parquet",
        *run_metadata(manifest),
    }


def test_growth_adds_rows_and_rewrites_nothing_but_metadata(fence: Fence) -> None:
    first = create(fence)
    complete(fence)
    before = state(fence)
    second = write_run(fence, first, grown(first), planned(LAYOUT.grow(3)))
    assert_readable(fence, second, filled=3)
    changed = {key for key, data in state(fence).items() if before.get(key) != data}
    assert before.keys() <= state(fence).keys()
    assert {key for key in changed if not key.endswith("zarr.json")} == {
        MANIFEST,
        MANIFEST_COPY,
        "plan/000001.parquet",
        "plan/000001.copy.parquet",
    }
    assert second.plan[0] == first.plan[0]
    complete(fence, second.layout, units=[3])
    assert_readable(fence, second, filled=4)
    run = open_run(fence.folder)
    assert run["status"].values.tolist() == [OK] * 10 + [PAD] * 2 + [OK] * 3 + [PAD]
    assert run["n_tokens"].values.tolist() == [*range(10, 20), 0, 0, 22, 23, 24, 0]


def test_a_session_without_growth_changes_the_manifest_only(fence: Fence) -> None:
    first = create(fence)
    before = state(fence)
    second = write_run(fence, first, replace(first, sessions=(*first.sessions, {"epoch": 2})), planned())
    assert {key for key, data in state(fence).items() if before.get(key) != data} == {MANIFEST, MANIFEST_COPY}
    assert (second.plan, second.metadata) == (first.plan, first.metadata)


def test_growth_by_an_array_and_by_spans(fence: Fence) -> None:
    first = create(fence)
    complete(fence)
    turns = ArraySpec(name="resid_post_turn", description="Means of turns", spans=("whole",))
    last = ArraySpec(name="resid_post_last", description="Last token")
    after = replace(first, arrays=(MEAN, last, turns), spans_per_rollout=2)
    second = write_run(fence, first, after, planned())
    assert_readable(fence, second, filled=3)
    run = open_run(fence.folder)
    assert set(run.data_vars) == {"resid_post_mean", "resid_post_last"}
    assert np.isnan(run["resid_post_last"].values).all()
    assert run.attrs["resid_post_mean"] == "5 of 5 layers complete"
    assert run.attrs["resid_post_last"] == "0 of 5 layers complete"


@pytest.mark.filterwarnings("error")
def test_a_crash_while_creating_leaves_nothing_or_the_run(tmp_path: Path) -> None:
    for step in itertools.count():
        with acquire(LocalFolder(tmp_path / f"run{step}"), timeout=60, say=pytest.fail) as lease:
            fence = lease.fence
            try:
                create(watched(fence, crash_at(step)))
            except KeyboardInterrupt:
                pass
            else:
                break
            if fence.folder.exists(MANIFEST):
                assert_readable(fence, require_manifest(fence.folder), filled=0)
            else:
                with pytest.raises(InputError, match="no run here"):
                    open_run(fence.folder)
            assert_plain_readers_open_it(fence, {12})
            refuse_foreign(fence.folder)
            stored = read_manifest(fence.folder)
            manifest = write_run(fence, stored, stored or small_manifest(), planned())
            assert fence.folder.get(MANIFEST_COPY) == fence.folder.get(MANIFEST)
            for entry in (*manifest.metadata, *manifest.plan):
                read_object(fence.folder, entry)
            assert read_plan(fence.folder, manifest) == planned()
    assert step == 2 + len(manifest.metadata) + 2  # Two plans, the metadata, two manifests.


@pytest.mark.filterwarnings("error")
def test_a_crash_while_growing_leaves_the_run_as_before_or_grown(tmp_path: Path, fence: Fence) -> None:
    first = create(fence)
    complete(fence)
    shutil.copytree(fence.folder.url, tmp_path / "base")
    data = {key: value for key, value in state(fence).items() if "/c/" in key or key.startswith("commits")}
    outcomes = []
    for step in itertools.count():
        crashed = Fence(LocalFolder(Path(shutil.copytree(tmp_path / "base", tmp_path / f"run{step}"))), fence.epoch)
        try:
            write_run(watched(crashed, crash_at(step)), first, grown(first), planned(LAYOUT.grow(3)))
        except KeyboardInterrupt:
            pass
        else:
            break
        stored = require_manifest(crashed.folder)
        outcomes.append(stored == first)
        assert_readable(crashed, stored, filled=3)
        assert_plain_readers_open_it(crashed, {12, 16})
        second = write_run(crashed, stored, grown(first) if stored == first else stored, planned(LAYOUT.grow(3)))
        assert second.layout == LAYOUT.grow(3)
        assert read_plan(crashed.folder, second) == planned(LAYOUT.grow(3))
        assert data.items() <= state(crashed).items()
        for entry in (*second.metadata, *second.plan):
            read_object(crashed.folder, entry)
        shutil.rmtree(crashed.folder.url)
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes[0]
    assert not outcomes[-1]  # The writes of the manifest's copy are after run.json's.
    assert len(outcomes) > 15


@pytest.mark.parametrize("step", [4, 10, 20])
def test_a_growth_that_is_given_up_leaves_a_run_that_can_go_on(fence: Fence, step: int) -> None:
    """The crash is followed by a session that does not grow, and by one that grows by something else."""
    first = create(fence)
    complete(fence, units=[0])
    with pytest.raises(KeyboardInterrupt):
        write_run(watched(fence, crash_at(step)), first, grown(first), planned(LAYOUT.grow(3)))
    resumed = write_run(fence, first, replace(first, sessions=(*first.sessions, {"epoch": 2})), planned())
    complete(fence, units=[1, 2])
    assert_readable(fence, resumed, filled=3)
    layout = LAYOUT.grow(6)
    other = write_run(fence, resumed, replace(resumed, layout=layout, unit_order=tuple(range(5))), planned(layout))
    assert_readable(fence, other, filled=3)


def test_a_growth_that_is_given_up_damages_nothing(fence: Fence) -> None:
    """What the manifest of the next session says of the metadata must be what is there, or `verify` sees damage."""
    first = create(fence)
    with pytest.raises(KeyboardInterrupt):
        write_run(watched(fence, crash_at(10)), first, grown(first), planned(LAYOUT.grow(3)))
    resumed = write_run(fence, first, replace(first, sessions=(*first.sessions, {"epoch": 2})), planned())
    for entry in resumed.metadata:
        read_object(fence.folder, entry)


def test_a_reader_in_another_process_sees_the_run_at_every_moment_of_a_growth(fence: Fence) -> None:
    """A fresh interpreter with every warning an error, asked between any two steps."""
    first = create(fence)
    complete(fence)
    script = f"""
import sys, xarray, zarr
from personaspace.store import open_run
sys.stdin.readline(), print("ready", flush=True)
for line in sys.stdin:
    group = {str(Path(fence.folder.url) / ZARR_GROUP)!r}
    arrays = zarr.open(group, mode="r")
    plain = xarray.open_zarr(group)
    run = open_run({fence.folder.url!r})
    values = int((plain["status"].values == 1).sum()), int((run["status"].values == 1).sum())
    print(arrays["status"].shape[0], plain.sizes["rollout"], run.sizes["rollout"], *values, flush=True)
"""
    reader = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    answers = []

    def ask() -> None:
        assert reader.stdin is not None
        assert reader.stdout is not None
        print("look", file=reader.stdin, flush=True)
        answers.append(reader.stdout.readline().split())

    ask()
    write_run(watched(fence, ask), first, grown(first), planned(LAYOUT.grow(3)))
    ask()
    _, errors = reader.communicate()
    assert reader.returncode == 0, errors
    zarr_rows, plain, ours, *counts = zip(*(map(int, answer) for answer in answers[1:]), strict=True)
    for seen in (zarr_rows, plain, ours):
        assert list(seen) == sorted(seen)
        assert (set(seen), seen[0], seen[-1]) == ({12, 16}, 12, 16)
    assert [set(count) for count in counts] == [{10}, {10}]


def test_another_drivers_change_is_not_overwritten(fence: Fence) -> None:
    first = create(fence)
    second = write_run(fence, first, replace(first, sessions=(*first.sessions, {"epoch": 2})), planned())
    with pytest.raises(LeaseError, match="was changed by another driver; start again"):
        write_run(fence, first, grown(first), planned(LAYOUT.grow(3)))
    assert read_manifest(fence.folder) == second
    with pytest.raises(LeaseError, match="was changed by another driver; start again"):
        create(fence, execution={"other": 1})
    assert read_manifest(fence.folder) == second


def test_a_fenced_out_driver_creates_nothing(fence: Fence) -> None:
    with pytest.raises(LeaseError, match="lease epoch 0 has ended"):
        create(Fence(fence.folder, 0))
    assert state(fence).keys() <= {".lock"}


@pytest.mark.parametrize("key", ["thesis.tex", "rollouts/000000.parquet", "commits/000000/a.000.000.json", "a/b"])
def test_a_folder_with_something_else_is_refused(tmp_path: Path, key: str) -> None:
    folder = LocalFolder(tmp_path / "run")
    folder.put_new(key, b"precious")
    message = rf"^{folder.url}: holds \['{key.split('/')[0]}'\], but no run\.json; choose an empty place for the run\."
    with pytest.raises(InputError, match=message):
        refuse_foreign(folder)
    refuse_foreign(folder, also=[key.split("/")[0]])
    folder.replace(MANIFEST, b"")
    refuse_foreign(folder)


def test_committed_data_is_not_looked_at_by_growth(fence: Fence) -> None:
    first = create(fence)
    complete(fence)
    slots = committed_slots(fence.folder)
    assert {(unit, group) for array, unit, group in slots if array == "resid_post_mean"} == set(ALL)
    write_run(fence, first, grown(first), planned(LAYOUT.grow(3)))
    assert committed_slots(fence.folder) == slots
