"""What a store holds: every state of a run, told from listings alone."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import xarray as xr
from zarr.storage import LocalStore

from personaspace.store.catalog import DamagedRun, RunSummary, describe, human_bytes, runs, summarize
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.freeze import freeze_run
from personaspace.store.index import write_index
from personaspace.store.layout import shard_key
from personaspace.store.lease import LEASE, Fence, acquire, read_holder
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import MANIFEST, MANIFEST_COPY, require_manifest
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec
from personaspace.store.scores import Score, commit_scores
from personaspace.store.space import save_space
from tests.store.small_runs import (
    LAYOUT,
    MEAN,
    commit_coordinates,
    commit_rollouts,
    commit_shards,
    complete,
    create,
    grow,
)


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "runs")


@contextmanager
def writing(root: LocalFolder, name: str) -> Iterator[Fence]:
    with acquire(root.child(name), timeout=60, say=pytest.fail) as lease:
        yield lease.fence


def make(root: LocalFolder, name: str, *units: int) -> LocalFolder:
    """A run of which some units are complete; its driver has ended."""
    with writing(root, name) as fence:
        create(fence)
        complete(fence, units=units)
    return root.child(name)


def test_planned(root: LocalFolder) -> None:
    summary = summarize(make(root, "a"))
    assert (summary.name, summary.url, summary.model) == ("a", str(root.path / "a"), "tiny")
    assert summary.state == "planned"
    assert (summary.generated, summary.extracted, summary.dropped) == (0, 0, 0)
    assert (summary.shards, summary.shards_wanted, summary.layers) == (0, 6, ())
    assert (summary.judges, summary.content_hash, summary.fitted, summary.reported) == ((), None, False, False)


def test_partial(root: LocalFolder) -> None:
    folder = make(root, "a", 0, 2)
    with writing(root, "a") as fence:
        commit_rollouts(fence, LAYOUT, [1])
        commit_shards(fence, LAYOUT, [(1, 0)])
    summary = summarize(folder)
    assert summary.state == "partial"
    assert (summary.generated, summary.extracted, summary.dropped) == (10, 6, 0)
    assert (summary.shards, summary.shards_wanted, summary.layers) == (5, 6, (0, 1, 2))


def test_writing_is_what_a_live_driver_does(root: LocalFolder) -> None:
    with writing(root, "a") as fence:
        create(fence)
        complete(fence, units=[0])
        assert summarize(fence.folder).state == "writing"
        complete(fence)
        assert summarize(fence.folder).state == "complete"
    assert summarize(root.child("a")).state == "complete"


def test_a_driver_elsewhere_counts_as_alive_until_it_released(root: LocalFolder) -> None:
    folder = make(root, "a", 0)
    holder = read_holder(folder)
    assert holder is not None
    folder.replace(LEASE, replace(holder, host="elsewhere", released=False).encode())
    assert summarize(folder).state == "writing"
    folder.replace(LEASE, replace(holder, released=False, pid=2**22 + 1).encode())
    assert summarize(folder).state == "partial"


def test_complete_needs_every_shard_and_all_coordinates(root: LocalFolder) -> None:
    with writing(root, "a") as fence:
        create(fence)
        commit_rollouts(fence, LAYOUT, range(3))
        commit_shards(fence, LAYOUT, [(unit, group) for unit in range(3) for group in range(2)])
        commit_coordinates(fence, LAYOUT, [0, 1])
    assert summarize(root.child("a")).state == "partial"
    with writing(root, "a") as fence:
        commit_coordinates(fence, LAYOUT, [2], dropped=[9])
    summary = summarize(root.child("a"))
    assert summary.state == "complete"
    assert (summary.extracted, summary.dropped, summary.layers) == (10, 1, (0, 1, 2, 3, 4))


def test_a_run_that_grew_is_partial_again(root: LocalFolder) -> None:
    folder = make(root, "a", 0, 1, 2)
    with writing(root, "a") as fence:
        write_index(fence, require_manifest(folder))
        grown = grow(fence, require_manifest(folder), 3)
    summary = summarize(folder)
    assert (summary.state, summary.generated, summary.extracted, summary.shards_wanted) == ("partial", 10, 10, 8)
    assert "planned    13 rollouts in 2 segments: 3 roles, 3 questions" in describe(summary)
    with writing(root, "a") as fence:
        complete(fence, grown.layout, units=[3])
    assert summarize(folder).state == "complete"


def test_layers_that_were_not_asked_for_are_not_missed(root: LocalFolder) -> None:
    with writing(root, "a") as fence:
        create(fence, arrays=(replace(MEAN, layers=(0, 1)),))
        commit_rollouts(fence, LAYOUT, range(3))
        commit_shards(fence, LAYOUT, [(unit, 0) for unit in range(3)])
        commit_coordinates(fence, LAYOUT, range(3))
    summary = summarize(root.child("a"))
    assert (summary.state, summary.shards, summary.shards_wanted, summary.layers) == ("complete", 3, 3, (0, 1, 2))


def test_every_array_is_wanted(root: LocalFolder) -> None:
    with writing(root, "a") as fence:
        create(fence, arrays=(MEAN, ArraySpec(name="resid_post_last", description="")))
        complete(fence)
    summary = summarize(root.child("a"))
    assert (summary.state, summary.shards, summary.shards_wanted) == ("partial", 6, 12)


def test_frozen(root: LocalFolder) -> None:
    folder = make(root, "a", 0, 1, 2)
    with writing(root, "a") as fence:
        frozen = freeze_run(fence, require_manifest(folder)).frozen
    summary = summarize(folder)
    assert frozen is not None
    assert (summary.state, summary.content_hash) == ("frozen", frozen["content_hash"])
    assert f"state      frozen as {frozen['content_hash']}" in describe(summary).splitlines()


def test_scores_fit_and_report(root: LocalFolder) -> None:
    folder = make(root, "a", 0)
    with writing(root, "a") as fence:
        for judge in ("b", "a"):
            commit_scores(fence, LAYOUT, judge, 0, [Score(row=0, score=1.0)])
        save_space(folder, xr.Dataset({"axis": ("layer", [1.0])}))
        folder.replace("report.html", b"")
    summary = summarize(folder)
    assert (summary.judges, summary.fitted, summary.reported) == (("a", "b"), True, True)
    lines = describe(summary).splitlines()
    assert "scores     a, b" in lines
    assert "fitted     yes" in lines
    assert f"report     {folder.url}/report.html" in lines


def test_size_is_that_of_all_objects(root: LocalFolder) -> None:
    folder = make(root, "a", 0)
    files = [Path(path) / name for path, _, names in os.walk(folder.path) for name in names]
    summary = summarize(folder)
    assert summary.objects == len(files)
    assert summary.bytes == sum(file.stat().st_size for file in files)


def test_no_activations_are_read(root: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(root, "a", 0, 1, 2)
    with writing(root, "a") as fence:
        write_index(fence, require_manifest(folder))
    monkeypatch.setattr(LocalStore, "get", lambda *_: pytest.fail("read a chunk"))
    get, seen = LocalFolder.get, []
    monkeypatch.setattr(LocalFolder, "get", lambda self, key: (seen.append(key), get(self, key))[1])
    assert summarize(folder).state == "complete"
    assert set(seen) == {"run.json", "lease.json", "index.json", "index.parquet"}


def test_runs_of_a_store(root: LocalFolder) -> None:
    assert list(runs(root)) == []
    make(root, "b", 0)
    make(root, "a")
    root.child("notes").put_new("thesis.tex", b"precious")
    root.put_new("README", b"")
    found = list(runs(root))
    assert [(run.name, run.state) for run in found if isinstance(run, RunSummary)] == [
        ("a", "planned"),
        ("b", "partial"),
    ]
    assert len(found) == 2


@pytest.mark.parametrize("damage", ["run.json", "lease.json", "index", "no run.json"])
def test_a_damaged_run_does_not_hide_the_others(root: LocalFolder, damage: str) -> None:
    for name in ("a", "b", "c"):
        make(root, name, 0)
    damaged = root.child("b")
    if damage == "index":
        damaged.delete("activations.zarr/status/c/0")
    elif damage == "no run.json":
        damaged.delete(MANIFEST)
    else:
        damaged.replace(damage, damaged.get(damage)[:-3])
    first, second, third = runs(root)
    assert isinstance(second, DamagedRun)
    assert (first.name, second.name, third.name) == ("a", "b", "c")
    assert second.url == damaged.url
    assert damaged.url in second.reason


def test_folders_whose_names_are_no_run_names_are_left_out(root: LocalFolder) -> None:
    make(root, "a")
    for name in ("my thesis", "ä", ".tmp"):
        (root.path / name).mkdir()
        (root.path / name / MANIFEST).write_text("{}")
    assert [run.name for run in runs(root)] == ["a"]


def test_what_is_no_run_is_one_clear_error(root: LocalFolder) -> None:
    with pytest.raises(InputError, match=re.escape(f"{root.url}/a: no run here (no run.json).")):
        summarize(root.child("a"))
    folder = make(root, "a")
    folder.replace(MANIFEST, folder.get(MANIFEST_COPY).replace(b"tiny", b"tidy"))
    with pytest.raises(IntegrityError, match=re.escape(f"{folder.url}/run.json: ")):
        summarize(folder)


def test_description(root: LocalFolder) -> None:
    with writing(root, "a") as fence:
        create(fence)
        complete(fence, units=[0, 1])
        commit_coordinates(fence, LAYOUT, [2], dropped=[8])
        summary = summarize(fence.folder)
        lines = dict(line.split(None, 1) for line in describe(summary).splitlines())
        lines["driver"] = re.sub(r" [0-9] s ago$", "", lines["driver"])
    assert lines == {
        "run": f"{root.url}/a  (identity {summary.manifest.identity_hash})",
        "state": "writing",
        "model": "tiny, 5 layers x 3",
        "planned": "10 rollouts: 3 roles, 3 questions (catalogue 00bdacde23b79032)",
        "generated": "8/10 rollouts",
        "extracted": "10/10 rollouts (1 dropped)",
        "shards": "4/6 of resid_post_mean, 0/5 layers complete",
        "precision": "lossless mantissa bits",
        "size": f"{human_bytes(summary.bytes)} in {summary.objects} objects",
        "scores": "no",
        "fitted": "no",
        "report": "no",
        "driver": f"{socket.gethostname()} pid {os.getpid()}, epoch 1, running, last sign of life",
        "sessions": "1, last by me on here at now",
        "code": "not in git",
    }


def test_description_of_the_driver(root: LocalFolder) -> None:
    folder = make(root, "a")
    mine = f"{socket.gethostname()} pid {os.getpid()}, epoch 1"
    assert f"driver     none (last: {mine})" in describe(summarize(folder))
    holder = read_holder(folder)
    assert holder is not None
    gone = replace(holder, released=False, pid=2**22 + 1, heartbeat=time.time() - 90)
    folder.replace(LEASE, gone.encode())
    where = f"{socket.gethostname()} pid {2**22 + 1}, epoch 1"
    assert re.search(rf"driver     {where}, gone, last sign of life 9[0-9] s ago", describe(summarize(folder)))
    folder.delete(LEASE)
    assert "driver     none yet" in describe(summarize(folder))


def test_leftovers_do_not_count_as_commits(root: LocalFolder) -> None:
    folder = make(root, "a")
    folder.put_new(shard_key(RESID_POST_MEAN, 0, 0), b"orphan")
    folder.put_new("commits/000000/.nfs0001", b"")
    (folder.path / "notes").mkdir()
    folder.put_new("notes/000000/resid_post_mean.000.000.json", json.dumps({}).encode())
    assert summarize(folder).state == "planned"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (39_200_000, "39.2 MB"),
        (10**9, "1.0 GB"),
        (12 * 10**12, "12.0 TB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
