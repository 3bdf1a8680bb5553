"""``open_run`` shows what is committed, all of it, and nothing else; selecting reads no more than it needs."""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from dask.base import tokenize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from personaspace.store import open_run, open_spans, select
from personaspace.store.commit import commit
from personaspace.store.committed import CommittedStore, chunk_slot
from personaspace.store.errors import InputError, IntegrityError
from personaspace.store.index import write_index
from personaspace.store.layout import ZARR_GROUP, Layout, coordinate_key, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.reader import stored_layers
from personaspace.store.records import committed_slots
from personaspace.store.schema import (
    RESID_POST_MEAN,
    SPAN_COORDINATES,
    ArraySpec,
    encode_coordinate,
    encode_shard,
)
from tests.store.small_runs import (
    ALL,
    DROPPED,
    LAYOUT,
    MEAN,
    OK,
    PAD,
    commit_coordinates,
    commit_shards,
    complete,
    coordinates,
    create,
    grow,
    shard_bytes,
    values,
)

ROLES = ["default"] * 4 + ["poet"] * 4 + ["hacker"] * 2 + [""] * 2
VALUES = values()


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    """A new run without any committed data."""
    with new_run(tmp_path / "run") as fence:
        yield fence


@contextmanager
def new_run(path: Path, layout: Layout = LAYOUT) -> Iterator[Fence]:
    with acquire(LocalFolder(path), timeout=60, say=pytest.fail) as lease:
        create(lease.fence, layout)
        yield lease.fence


def assert_visible(dataset: xr.Dataset, shards: Iterable[tuple[int, int]]) -> None:
    expected = np.full_like(VALUES, np.nan)
    for unit, group in shards:
        layers = LAYOUT.group_layers(group)
        place = LAYOUT.unit_slice(unit), slice(layers.start, layers.stop)
        expected[place] = VALUES[place]
    np.testing.assert_array_equal(dataset[RESID_POST_MEAN].values, expected)


def test_new_run_is_all_pending_but_planned(fence: Fence) -> None:
    dataset = open_run(fence.folder)
    assert dataset.sizes == {"rollout": 12, "layer": 5, "hidden": 3}
    assert dataset[RESID_POST_MEAN].dtype == np.float32
    assert set(dataset.coords) == {
        "rollout_id",
        "role",
        "role_id",
        "prompt",
        "question",
        "question_id",
        "sample",
        "n_tokens",
        "status",
        "layer",
    }
    assert (dataset["status"] == 0).all()
    assert dataset["role"].values.tolist() == ROLES
    assert dataset["role_id"].values.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [-1] * 2
    assert dataset["prompt"].values.tolist() == [0, 1] * 5 + [-1] * 2
    assert dataset["question"].values.tolist() == [0, 1, 2] * 3 + [0, -1, -1]
    assert dataset["question_id"].values.tolist() == ["q0", "q1", "q2"] * 3 + ["q0", "", ""]
    assert dataset["rollout_id"].values.tolist() == [f"{row:016x}" for row in range(10)] + ["", ""]
    assert_visible(dataset, [])
    assert dataset.attrs["rollouts"] == "10 planned: 0 ok, 0 dropped, 10 pending"
    assert dataset.attrs[RESID_POST_MEAN] == "0 of 5 layers complete"


@pytest.mark.parametrize("how", [str, Path, LocalFolder])
def test_complete_run_shows_everything(fence: Fence, how: Any) -> None:
    complete(fence)
    path = Path(fence.folder.url)
    dataset = open_run(how(path))
    assert_visible(dataset, ALL)
    assert dataset["role"].values.tolist() == ROLES
    assert dataset["status"].values.tolist() == [OK] * 10 + [PAD] * 2
    assert dataset["n_tokens"].values.tolist() == [*range(10, 20), 0, 0]
    assert dataset["layer"].values.tolist() == [0, 1, 2, 3, 4]
    assert dataset[RESID_POST_MEAN].chunks == ((4, 4, 4), (3, 2), (3,))
    assert dataset.attrs["run"] == str(path)
    assert dataset.attrs["model"] == "tiny"
    assert dataset.attrs["precision"] == "lossless mantissa bits"
    assert dataset.attrs["rollouts"] == "10 planned: 10 ok, 0 dropped, 0 pending"
    assert dataset.attrs[RESID_POST_MEAN] == "5 of 5 layers complete"


def test_dropped_rollouts_are_marked(fence: Fence) -> None:
    commit_coordinates(fence, LAYOUT, [0], dropped=[2])
    dataset = open_run(fence.folder)
    assert dataset["status"].values.tolist() == [OK, OK, DROPPED, OK] + [0] * 8
    assert dataset.attrs["rollouts"] == "10 planned: 3 ok, 1 dropped, 6 pending"


def test_objects_without_record_are_not_seen(fence: Fence) -> None:
    commit_shards(fence, LAYOUT, [(0, 0)])
    commit_coordinates(fence, LAYOUT, [0])
    for unit, group in ALL:
        fence.folder.put_new(shard_key(RESID_POST_MEAN, unit, group), shard_bytes(LAYOUT, unit, group))
    for key, data in coordinates(LAYOUT, 1).items():
        fence.folder.put_new(key, data)
    dataset = open_run(fence.folder)
    assert_visible(dataset, [(0, 0)])
    assert dataset["status"].values.tolist() == [OK] * 4 + [0] * 8
    assert dataset["role"].values.tolist() == ROLES


def test_damaged_objects_without_record_are_not_read(fence: Fence) -> None:
    commit_shards(fence, LAYOUT, [(0, 0)])
    commit_coordinates(fence, LAYOUT, [0])
    fence.folder.put_new(shard_key(RESID_POST_MEAN, 1, 0), b"damaged")
    fence.folder.put_new(coordinate_key("status", 1), b"damaged")
    assert_visible(open_run(fence.folder), [(0, 0)])
    assert open_run(fence.folder)["status"].values.tolist() == [OK] * 4 + [0] * 8


@given(committed=st.sets(st.sampled_from(ALL)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_of_the_shards(tmp_path_factory: pytest.TempPathFactory, committed: set[tuple[int, int]]) -> None:
    with new_run(tmp_path_factory.mktemp("store") / "run") as fence:
        commit_shards(fence, LAYOUT, sorted(committed))
        assert_visible(open_run(fence.folder), committed)


def test_a_run_that_grew_shows_old_and_new(fence: Fence) -> None:
    complete(fence)
    grown = grow(fence, require_manifest(fence.folder), 3)
    run = open_run(fence.folder)
    assert run.attrs["rollouts"] == "13 planned: 10 ok, 0 dropped, 3 pending"
    assert run.attrs[RESID_POST_MEAN] == "0 of 5 layers complete"
    assert run["status"].values.tolist() == [OK] * 10 + [PAD] * 2 + [0] * 4
    assert run["role"].values.tolist() == [*ROLES, "hacker", "hacker", "hacker", ""]
    complete(fence, grown.layout, units=[3])
    run = open_run(fence.folder)
    np.testing.assert_array_equal(run[RESID_POST_MEAN].values, values(grown.layout))
    assert run.attrs[RESID_POST_MEAN] == "5 of 5 layers complete"


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Unit 0 and 2 whole, of unit 1 only the first layers; beside it, shards without a record."""
    with new_run(tmp_path_factory.mktemp("store") / "partly") as fence:
        commit_shards(fence, LAYOUT, [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)])
        commit_coordinates(fence, LAYOUT, [0, 1, 2], dropped=[5])
        fence.folder.put_new(shard_key(RESID_POST_MEAN, 1, 1), shard_bytes(LAYOUT, 1, 1))
        return open_run(fence.folder)


def indices(size: int) -> st.SearchStrategy[Any]:
    return (
        st.integers(-size, size - 1)
        | st.slices(size).filter(lambda part: (part.step or 1) > 0)
        | st.lists(st.integers(0, size - 1), max_size=5)
    )


@given(rows=indices(12), layers=indices(5), hidden=indices(3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_indexing_equals_that_of_the_full_array(partly: xr.Dataset, rows: Any, layers: Any, hidden: Any) -> None:
    full = partly[RESID_POST_MEAN].values
    chosen = partly[RESID_POST_MEAN].isel(rollout=rows, layer=layers, hidden=hidden)
    expected = full
    for axis, index in reversed(list(enumerate((rows, layers, hidden)))):
        chosen_axis = np.array(index, dtype=np.intp) if isinstance(index, list) else index
        expected = expected[(slice(None),) * axis + (chosen_axis,)]
    np.testing.assert_array_equal(chosen.values, expected)


@given(
    role=st.none() | st.sampled_from(["poet", "hacker"]) | st.just(["default", "hacker"]),
    prompt=st.none() | st.sampled_from([0, 1]),
    question=st.none() | st.sampled_from([0, 2, "q1"]) | st.just(["q0", "q2"]),
    layer=st.none() | st.sampled_from([0, 4]) | st.just([1, 3]) | st.just([4, 0]),
    status=st.sampled_from(["ok", "dropped", "pad", None]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_select_equals_a_filter_of_rows(
    partly: xr.Dataset, role: Any, prompt: Any, question: Any, layer: Any, status: str | None
) -> None:
    full = partly[RESID_POST_MEAN].values
    rows = []
    for row in range(12):
        entry = {name: partly[name].values[row] for name in ("role", "prompt", "question", "question_id", "status")}
        code = None if status is None else ["pending", "ok", "dropped", "pad"].index(status)
        if (
            (role is None or entry["role"] in np.atleast_1d(role))
            and (prompt is None or entry["prompt"] == prompt)
            and (question is None or {entry["question"], entry["question_id"]} & set(np.atleast_1d(question).tolist()))
            and (code is None or entry["status"] == code)
        ):
            rows.append(row)
    layers = [0, 1, 2, 3, 4] if layer is None else list(np.atleast_1d(layer))
    chosen = select(partly, role=role, prompt=prompt, question=question, layer=layer, status=status)
    assert chosen[RESID_POST_MEAN].dims == ("rollout", "layer", "hidden")
    assert chosen["rollout_id"].values.tolist() == partly["rollout_id"].values[rows].tolist()
    assert chosen["layer"].values.tolist() == layers
    np.testing.assert_array_equal(chosen[RESID_POST_MEAN].values, full[rows][:, layers])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"role": "pirate"}, "role: 'pirate' is not in this run. It has default, hacker, poet."),
        ({"role": ["poet", "pirate"]}, "role: 'pirate' is not in this run. It has default, hacker, poet."),
        ({"prompt": 7}, "prompt: 7 is not in this run. It has 0, 1."),
        ({"question": 3}, "question: 3 is not in this run. It has 0, 1, 2."),
        ({"question": "q9"}, "question_id: 'q9' is not in this run. It has q0, q1, q2."),
        ({"layer": 5}, "layer: 5 is not in this run. It has 0, 1, 2, 3, 4."),
        ({"layer": [0, -1]}, "layer: -1 is not in this run. It has 0, 1, 2, 3, 4."),
        ({"status": "fine"}, "status: 'fine'; allowed are pending, ok, dropped, pad, or None for every row."),
        (
            {"score": 3},
            "score: the run has none. Import or judge first, or name the judge: open_run(scores=...).",
        ),
    ],
)
def test_unknown_values_are_refused_with_what_there_is(
    partly: xr.Dataset, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        select(partly, **wanted)


# What is read.

WIDE = Layout(segments=(40,), layers=8, hidden=16, unit_rows=4, layer_group=4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    """Ten units of two groups of four layers, whole, with an index."""
    with new_run(tmp_path_factory.mktemp("store") / "wide", WIDE) as fence:
        complete(fence, WIDE)
        write_index(fence, require_manifest(fence.folder))
        assert isinstance(fence.folder, LocalFolder)
        return fence.folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Key in the Zarr group and bytes of every read from it, from here on, through the folder or through Zarr."""
    found: list[tuple[str, int]] = []

    def count(key: str, data: Any) -> Any:
        if data is not None and key.startswith(f"{ZARR_GROUP}/"):
            found.append((key.removeprefix(f"{ZARR_GROUP}/"), len(data)))
        return data

    def counting(read: Callable[..., bytes]) -> Callable[..., bytes]:
        return lambda self, key, *place: count(key, read(self, key, *place))

    for name in ("get", "get_range", "get_tail"):
        monkeypatch.setattr(LocalFolder, name, counting(getattr(LocalFolder, name)))
    read = LocalStore.get

    async def counted_by_zarr(
        self: LocalStore, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        data = await read(self, key, prototype, byte_range)
        count(f"{ZARR_GROUP}/{key}", data)
        return data

    monkeypatch.setattr(LocalStore, "get", counted_by_zarr)
    return found


def shards_read(reads: list[tuple[str, int]]) -> set[str]:
    assert all(key.startswith(f"{RESID_POST_MEAN}/c/") for key, _ in reads)
    return {key.removeprefix(f"{RESID_POST_MEAN}/c/") for key, _ in reads}


def test_opening_reads_no_data(wide: LocalFolder, reads: list[tuple[str, int]]) -> None:
    run = open_run(wide)
    assert [key for key, _ in reads if "/c/" in key] == []
    reads.clear()
    select(run, role="poet", prompt=1, question="q1", layer=5)
    assert reads == []


def test_every_read_is_counted(wide: LocalFolder, reads: list[tuple[str, int]]) -> None:
    open_run(wide)[RESID_POST_MEAN].load()
    stored = {entry.key: entry.bytes for entry in wide.list(f"{ZARR_GROUP}/{RESID_POST_MEAN}/c")}
    assert {f"{ZARR_GROUP}/{key}": size for key, size in reads} == stored
    reads.clear()
    xr.open_zarr(wide.path / ZARR_GROUP)["status"].load()
    assert ("status/c/3", 8) in reads


@pytest.mark.parametrize(
    ("wanted", "shards"),
    [
        ({"role": "poet", "layer": 5}, {"1/1/0"}),
        ({"role": "poet"}, {"1/0/0", "1/1/0"}),
        ({"role": ["default", "poet"], "layer": [0, 3]}, {"0/0/0", "1/0/0"}),
        ({"layer": 7}, {f"{unit}/1/0" for unit in range(10)}),
        ({"role": "default", "question": 2, "prompt": 0, "layer": 0}, {"0/0/0"}),
        ({"role": "default", "status": "dropped"}, set()),
    ],
)
def test_selecting_reads_only_the_shards_it_needs(
    wide: LocalFolder, reads: list[tuple[str, int]], wanted: dict[str, Any], shards: set[str]
) -> None:
    run = open_run(wide)
    reads.clear()
    chosen = select(run, **wanted)[RESID_POST_MEAN]
    assert reads == []
    rows = [int(identity, 16) for identity in chosen["rollout_id"].values]
    layers = chosen["layer"].values
    np.testing.assert_array_equal(chosen.values, values(WIDE)[rows][:, layers])
    assert shards_read(reads) == shards


@pytest.mark.parametrize("layer", [5, [5], [4, 5], [6, 0], 7])
@pytest.mark.parametrize("wanted", [{"role": "poet"}, {"role": "poet", "prompt": 1}, {}])
def test_selecting_layers_reads_only_their_inner_chunks(
    wide: LocalFolder, reads: list[tuple[str, int]], wanted: dict[str, Any], layer: Any
) -> None:
    """Of a group of four layers; on large models, a group has ten."""
    layers = np.atleast_1d(layer)
    run = open_run(wide)
    reads.clear()
    chosen = select(run, layer=layer, **wanted)[RESID_POST_MEAN]
    rows = [int(identity, 16) for identity in chosen["rollout_id"].values]
    np.testing.assert_array_equal(chosen.values, values(WIDE)[rows][:, layers])
    units = {row // WIDE.unit_rows for row in rows}
    assert shards_read(reads) == {f"{unit}/{one // 4}/0" for unit in units for one in layers}
    index = WIDE.layer_group * 16 + 4
    shards = [wide.path / shard_key(RESID_POST_MEAN, unit, one // 4) for unit in units for one in layers]
    needed = sum((shard.stat().st_size - index) / WIDE.layer_group + index for shard in shards)
    assert sum(size for _, size in reads) <= needed * 1.05


@pytest.mark.parametrize("layer", [[6, 4], [4, 7], [4, 5, 6, 7], None])
def test_no_shard_is_read_twice(wide: LocalFolder, reads: list[tuple[str, int]], layer: Any) -> None:
    run = open_run(wide)
    reads.clear()
    _ = select(run, role="poet", layer=layer)[RESID_POST_MEAN].values
    assert sum(size for _, size in reads) <= sum(
        (wide.path / ZARR_GROUP / RESID_POST_MEAN / "c" / shard).stat().st_size for shard in shards_read(reads)
    )


def test_a_mean_over_one_role_reads_each_shard_once(wide: LocalFolder, reads: list[tuple[str, int]]) -> None:
    run = open_run(wide)
    reads.clear()
    mean = select(run, role="hacker")[RESID_POST_MEAN].mean("rollout").values
    np.testing.assert_allclose(mean, values(WIDE)[8:].mean(axis=0), rtol=1e-5, atol=1e-6)
    assert sorted(reads) == sorted(set(reads))
    assert len(shards_read(reads)) == 8 * 2


# States and processes.


def test_dataset_survives_pickling_into_another_process(partly: xr.Dataset, tmp_path: Path) -> None:
    (tmp_path / "dataset").write_bytes(pickle.dumps(partly))
    script = f"""
import pickle, sys
dataset = pickle.load(open({str(tmp_path / "dataset")!r}, "rb"))
sys.stdout.buffer.write(dataset[{RESID_POST_MEAN!r}].values.tobytes())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    read = np.frombuffer(done.stdout, dtype=np.float32).reshape(12, 5, 3)
    np.testing.assert_array_equal(read, partly[RESID_POST_MEAN].values)


def test_dask_workers_in_other_processes_read_it(partly: xr.Dataset) -> None:
    with dask.config.set(scheduler="processes", num_workers=2):
        read = partly[RESID_POST_MEAN].values
    np.testing.assert_array_equal(read, partly[RESID_POST_MEAN].values)


def test_dask_tells_two_states_of_a_run_apart(fence: Fence) -> None:
    """Or a notebook that opens a growing run again would get the old chunks from Dask's cache."""

    def names() -> str:
        return str(open_run(fence.folder)[RESID_POST_MEAN].data.name)

    commit_shards(fence, LAYOUT, [(0, 0)])
    seen = [names()]
    assert names() == seen[0]
    commit_shards(fence, LAYOUT, [(0, 1)])
    seen.append(names())
    commit(
        fence,
        (RESID_POST_MEAN, 0, 1),
        {shard_key(RESID_POST_MEAN, 0, 1): shard_bytes(LAYOUT, 0, 1)},
        rows=range(4),
        dropped={},
        generation=1,
    )
    seen.append(names())
    assert len(set(seen)) == 3


def test_the_stores_of_two_states_differ(fence: Fence) -> None:
    before, again = (CommittedStore(fence.folder, committed_slots(fence.folder)) for _ in range(2))
    assert before == again
    assert tokenize(before) == tokenize(again)
    assert hash(before) == hash(again)
    commit_shards(fence, LAYOUT, [(0, 0)])
    after = CommittedStore(fence.folder, committed_slots(fence.folder))
    assert before != after
    assert tokenize(before) != tokenize(after)
    assert pickle.loads(pickle.dumps(after)) == after


def test_an_open_run_does_not_change_while_more_is_committed(fence: Fence) -> None:
    commit_shards(fence, LAYOUT, [(0, 0)])
    run = open_run(fence.folder)
    commit_shards(fence, LAYOUT, [(0, 1), (1, 0)])
    commit_coordinates(fence, LAYOUT, [0])
    assert_visible(run, [(0, 0)])
    assert (run["status"].values == 0).all()
    assert_visible(open_run(fence.folder), [(0, 0), (0, 1), (1, 0)])


def test_missing_run_is_one_clear_error(tmp_path: Path) -> None:
    message = f"{tmp_path / 'nowhere'}: no run here (no run.json). Give the folder of a run, such as runs/demo."
    for opening in (open_run, open_spans):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$") as error:
            opening(tmp_path / "nowhere")
        assert error.value.exit_code == 2


def test_a_recorded_shard_that_is_missing_is_an_error_and_not_nan(fence: Fence) -> None:
    commit_shards(fence, LAYOUT, [(0, 0), (0, 1)])
    run = open_run(fence.folder)
    fence.folder.delete(shard_key(RESID_POST_MEAN, 0, 1))
    assert np.isfinite(run[RESID_POST_MEAN][:4, :3].values).all()
    message = rf"^{fence.folder.url}/activations\.zarr/resid_post_mean/c/0/1/0: is recorded, but missing\.$"
    for part in (run[RESID_POST_MEAN][:4], run[RESID_POST_MEAN][2, 4], open_run(fence.folder)[RESID_POST_MEAN]):
        with pytest.raises(IntegrityError, match=message):
            part.compute()


def test_a_recorded_coordinate_that_is_missing_is_an_error(fence: Fence) -> None:
    commit_coordinates(fence, LAYOUT, [0, 1])
    fence.folder.delete(coordinate_key("status", 1))
    with pytest.raises(IntegrityError, match=r"activations\.zarr/status/c/1: is recorded, but missing\."):
        open_run(fence.folder)


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("resid_post_mean/c/3/1/0", ("resid_post_mean", 3, 1)),
        ("role/c/12", ("coordinates", 12, 0)),
        ("status/c/0", ("coordinates", 0, 0)),
        ("spans/resid_post_turn/c/3/1/0", ("spans.resid_post_turn", 3, 1)),
        ("spans/count/c/3", ("spans.coordinates", 3, 0)),
        ("layer/c/0", None),
        ("spans/layer/c/0", None),
        ("zarr.json", None),
        ("role/zarr.json", None),
        ("resid_post_mean/c", None),
    ],
)
def test_slot_of_a_chunk(key: str, slot: object) -> None:
    assert chunk_slot(key) == slot


def test_stored_layers(fence: Fence) -> None:
    manifest = require_manifest(fence.folder)
    commit_shards(fence, LAYOUT, [(0, 0), (0, 1), (1, 0)])
    commit_coordinates(fence, LAYOUT, [0])
    assert stored_layers(fence.folder, manifest, MEAN) == [0, 1, 2, 3, 4]
    assert stored_layers(fence.folder, manifest, replace(MEAN, layers=(1,))) == [0, 1, 2]
    commit_coordinates(fence, LAYOUT, [1])
    assert stored_layers(fence.folder, manifest, MEAN) == [0, 1, 2]


# Spans.

CAPACITY = 3
TURNS = ArraySpec(name="resid_post_turn", description="Means of turns", spans=("whole",))
USED = {0: [(0, 1, 5)], 1: [(0, 2, 6), (0, 3, 4), (1, 1, 9)], 4: [(0, 1, 2), (1, 1, 3)], 9: [(0, 3, 1)]}
"""Row -> spans (turn, part, tokens)."""


def commit_spans(fence: Fence, unit: int) -> None:
    """A unit's spans, written by hand as an extraction by turns would."""
    spans = LAYOUT.of_spans(CAPACITY)
    rows = range(unit * LAYOUT.unit_rows, (unit + 1) * LAYOUT.unit_rows)
    places = [(row, place) for row in rows for place in range(CAPACITY)]
    used = [USED.get(row, [])[place] if place < len(USED.get(row, [])) else (0, 0, 0) for row, place in places]
    columns = {
        "rollout": np.array([row for row, _ in places], dtype=np.int32),
        "turn": np.array([turn for turn, _, _ in used], dtype=np.int32),
        "part": np.array([part for _, part, _ in used], dtype=np.uint8),
        "count": np.array([count for _, _, count in used], dtype=np.int32),
    }
    for group in range(LAYOUT.groups):
        data = np.full((spans.unit_rows, len(spans.group_layers(group)), 3), np.nan, dtype=np.float32)
        for index, ((row, place), (_, part, _)) in enumerate(zip(places, used, strict=True)):
            if part:
                data[index] = 100 * row + place
        objects = {shard_key(TURNS.path, unit, group): encode_shard(data, spans, "lossless")}
        commit(fence, (TURNS.record, unit, group), objects, rows=LAYOUT.unit_row_range(unit), dropped={})
    objects = {
        coordinate_key(f"spans/{name}", unit): encode_coordinate(columns[name], spans, name, spans=True)
        for name in SPAN_COORDINATES
    }
    commit(fence, ("spans.coordinates", unit, 0), objects, rows=LAYOUT.unit_row_range(unit), dropped={})


@pytest.fixture
def ragged(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "ragged"), timeout=60, say=pytest.fail) as lease:
        create(lease.fence, arrays=(MEAN, TURNS), spans_per_rollout=CAPACITY)
        yield lease.fence


def test_spans_are_read_without_unused_places(ragged: Fence) -> None:
    for unit in range(3):
        commit_spans(ragged, unit)
    spans = open_spans(ragged.folder)
    assert spans["resid_post_turn"].dims == ("span", "layer", "hidden")
    assert set(spans.coords) == {"rollout", "turn", "part", "count", "layer"}
    expected = [(row, *span) for row, entries in USED.items() for span in entries]
    names = {1: "whole", 2: "think", 3: "answer"}
    assert spans["rollout"].values.tolist() == [row for row, *_ in expected]
    assert spans["turn"].values.tolist() == [turn for _, turn, _, _ in expected]
    assert spans["part"].values.tolist() == [names[part] for *_, part, _ in expected]
    assert spans["count"].values.tolist() == [count for *_, count in expected]
    places = [100 * row + place for row, entries in USED.items() for place in range(len(entries))]
    np.testing.assert_array_equal(
        spans["resid_post_turn"].values, np.broadcast_to(np.array(places)[:, None, None], (7, 5, 3))
    )
    assert spans.attrs["run"] == ragged.folder.url
    assert set(open_run(ragged.folder).data_vars) == {"resid_post_mean"}


def test_only_committed_spans_are_seen(ragged: Fence) -> None:
    assert open_spans(ragged.folder).sizes["span"] == 0
    commit_spans(ragged, 1)
    assert open_spans(ragged.folder)["rollout"].values.tolist() == [4, 4]
    ragged.folder.delete(shard_key(TURNS.path, 1, 0))
    with pytest.raises(IntegrityError, match=r"spans/resid_post_turn/c/1/0/0: is recorded, but missing\."):
        open_spans(ragged.folder)["resid_post_turn"].load()


def test_spans_survive_growth(ragged: Fence) -> None:
    for unit in range(3):
        commit_spans(ragged, unit)
    before = open_spans(ragged.folder).load()
    grow(ragged, require_manifest(ragged.folder), 5)
    xr.testing.assert_identical(open_spans(ragged.folder).load(), before)


def test_a_run_without_spans_says_so(fence: Fence) -> None:
    message = f"{fence.folder.url}: the run has no arrays by span; open_run reads what it has."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        open_spans(fence.folder)


def test_a_reader_that_read_the_manifest_before_growth_sees_the_run_before(fence: Fence) -> None:
    """The group's metadata is published ahead of run.json, so it may describe a longer axis."""
    complete(fence)
    manifest = require_manifest(fence.folder)
    grow(fence, manifest, 3)
    for key in ("run.json", "run.copy.json"):
        fence.folder.replace(key, manifest.encode())
    run = open_run(fence.folder)
    assert run.sizes["rollout"] == 12
    assert_visible(run, ALL)
    assert xr.open_zarr(Path(fence.folder.url) / ZARR_GROUP).sizes["rollout"] == 16
