"""A run grows by arrays: other sites, other reductions, and reductions with a row for each span."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from personaspace.store import open_run, open_spans
from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError
from personaspace.store.layout import ZARR_GROUP, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest
from personaspace.store.schema import PARTS, SPAN_COORDINATES, ArraySpec, encode_coordinate, encode_shard
from personaspace.store.verify import verify
from tests.store.small_runs import ALL, LAYOUT, MEAN, commit_shards, complete, create, planned, values

PRE = ArraySpec(name="resid_pre_mean", description="Mean over the response, before each block")
TURNS = ArraySpec(name="resid_post_mean", description="Mean over each turn", spans=("whole",))
CAPACITY = 2
SPANS = LAYOUT.of_spans(CAPACITY)


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def stored(folder: LocalFolder) -> dict[str, bytes]:
    return {
        entry.key: folder.get(entry.key)
        for entry in folder.list()
        if entry.key.startswith(("commits", "rollouts")) or "/c/" in entry.key
    }


def grow(fence: Fence, before: Manifest, spec: ArraySpec, spans_per_rollout: int = 0) -> Manifest:
    after = replace(before, arrays=(*before.arrays, spec), spans_per_rollout=spans_per_rollout)
    return write_run(fence, before, after, planned())


def commit_spans(fence: Fence, unit: int) -> None:
    """Two spans for each rollout of the unit: its think part and its answer."""
    rows = LAYOUT.unit_row_range(unit)
    places = [(row, part) for row in rows for part in ("think", "answer")]
    columns = {
        "rollout": [row for row, _ in places],
        "turn": [0] * len(places),
        "part": [PARTS.index(part) for _, part in places],
        "count": [row + 1 for row, _ in places],
    }
    chunks = {}
    for name, (dtype, _) in SPAN_COORDINATES.items():
        column = np.zeros(SPANS.unit_rows, dtype=dtype)
        column[: len(places)] = columns[name]
        chunks[f"{ZARR_GROUP}/spans/{name}/c/{unit}"] = encode_coordinate(column, SPANS, name, spans=True)
    for group in range(SPANS.groups):
        part = np.full((SPANS.unit_rows, len(SPANS.group_layers(group)), SPANS.hidden), np.nan, dtype=np.float32)
        for place, (row, _) in enumerate(places):
            part[place] = row * 10 + place
        key = shard_key(TURNS.path, unit, group)
        data = {key: encode_shard(part, SPANS, "lossless")}
        commit(fence, (TURNS.record, unit, group), data, rows=rows, dropped={})
    commit(fence, ("spans.coordinates", unit, 0), chunks, rows=rows, dropped={})


def test_another_site_is_added_and_nothing_is_rewritten(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=print) as lease:
        manifest = create(lease.fence)
        complete(lease.fence)
        before = stored(folder)
        grow(lease.fence, manifest, PRE)
        run = open_run(folder)
        assert set(run.data_vars) == {MEAN.name, PRE.name}
        assert np.isnan(run[PRE.name].values).all()
        np.testing.assert_array_equal(run[MEAN.name].values, values())
        commit_shards(lease.fence, LAYOUT, ALL, PRE.record)
    run = open_run(folder)
    np.testing.assert_array_equal(run[PRE.name].values, values())
    assert run.attrs[PRE.name] == "5 of 5 layers complete"
    assert before.items() <= stored(folder).items()
    assert verify(folder).problems == ()


def test_spans_are_added_and_open_as_a_dataset_of_their_own(folder: LocalFolder) -> None:
    with acquire(folder, timeout=60, say=print) as lease:
        manifest = create(lease.fence)
        complete(lease.fence)
        before = stored(folder)
        with pytest.raises(InputError, match="no arrays by span"):
            open_spans(folder)
        grow(lease.fence, manifest, TURNS, CAPACITY)
        assert open_spans(folder).sizes["span"] == 0
        commit_spans(lease.fence, 2)
    spans = open_spans(folder)
    assert spans["rollout"].values.tolist() == [8, 8, 9, 9]
    assert spans["part"].values.tolist() == ["think", "answer"] * 2
    assert spans["count"].values.tolist() == [9, 9, 10, 10]
    np.testing.assert_array_equal(spans[TURNS.name].values[:, 4, 0], [80, 81, 92, 93])
    assert set(open_run(folder).data_vars) == {MEAN.name}
    assert before.items() <= stored(folder).items()
    assert verify(folder).problems == ()


def test_plain_readers_open_every_state_without_warnings(folder: LocalFolder) -> None:
    script = (
        "import sys, xarray, zarr; store = sys.argv[1]; zarr.open_group(store, mode='r'); "
        "print(sorted(xarray.open_zarr(store).data_vars), sorted(xarray.open_datatree(store, engine='zarr').groups))"
    )

    def plain() -> str:
        command = [sys.executable, "-W", "error", "-c", script, str(folder.path / ZARR_GROUP)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with acquire(folder, timeout=60, say=print) as lease:
        manifest = create(lease.fence)
        complete(lease.fence)
        assert plain() == "['resid_post_mean'] ['/']"
        manifest = grow(lease.fence, manifest, PRE)
        assert plain() == "['resid_post_mean', 'resid_pre_mean'] ['/']"
        grow(lease.fence, manifest, TURNS, CAPACITY)
        commit_spans(lease.fence, 0)
        assert plain() == "['resid_post_mean', 'resid_pre_mean'] ['/', '/spans']"
