"""Three ways to spread a model over actors: the same numbers, the same text, and one run may use several."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event, ReplicaStarted
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job
from personaspace.cluster.room import Node
from personaspace.cluster.session import hold_run
from personaspace.cluster.sharding import extraction_shares, gang_size
from personaspace.config import load_config
from personaspace.store import open_run
from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from personaspace.store.records import read_records
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.cluster.gang_processes import needs_deepspeed
from tests.cluster.small_jobs import job_for, job_of, make_place, talk
from tests.cluster.test_extraction import plain_means

TALKS = {
    "default": [talk("?", f"Number {number}, and so it goes.") for number in range(8)],
    "ghost": [talk("?", f"Boo {number}.") for number in range(8)],
}
WAYS: dict[str, dict[str, Any]] = {
    "pipeline of 1": {"stages": 1},
    "pipeline of 2": {"stages": 2},
    "pipeline of 3": {"stages": 3},
    "gang of 2": {"sharding": "tensor", "ranks": 2},
    "offload to disk": {"sharding": "offload", "offload_to": "disk"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"), TALKS)


def run(job: Job, **config: Any) -> list[Event]:
    """Import and extract."""
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        for step in (generate, extract):
            step(job, fence, ClusterConfig(device="cpu", **config), events.append)
    return events


def errors(job: Job, model: Path) -> dict[int, NDArray[np.float32]]:
    """Row -> relative error of each layer against one plain forward pass."""
    stored = open_run(job.folder).load()[RESID_POST_MEAN].values
    return {
        row: np.linalg.norm(stored[row] - means_LD, axis=1) / np.linalg.norm(means_LD, axis=1)
        for row, means_LD in plain_means(model, job).items()
    }


@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(name, marks=pytest.mark.nightly if name == "pipeline of 3" else ())
        for name in WAYS
        if name != "gang of 2"
    ],
)
def test_all_ways_give_what_one_plain_pass_gives(place: Path, way: str) -> None:
    job = job_for(place, way.replace(" ", "-"))
    events = run(job, **WAYS[way])
    [started] = [event for event in events if isinstance(event, ReplicaStarted)]
    assert len(started.workers) == WAYS[way].get("stages", 1)
    assert max(error_L.max() for error_L in errors(job, place / "model").values()) <= 1e-5
    assert verify(job.folder).problems == ()


@needs_deepspeed
@pytest.mark.usefixtures("own_ray")
def test_a_gang_gives_the_same_and_its_ranks_share_the_writing(place: Path) -> None:
    job = job_for(place, "gang")
    events = run(job, **WAYS["gang of 2"])
    [started] = [event for event in events if isinstance(event, ReplicaStarted)]
    assert len({worker.pid for worker in started.workers}) == 2
    assert max(error_L.max() for error_L in errors(job, place / "model").values()) <= 1e-5
    writers = {
        slot[2]: record.writer.rpartition(":")[2] for slot, record in read_records(job.folder, RESID_POST_MEAN).items()
    }
    pids = [str(worker.pid) for worker in started.workers]
    assert writers == {0: pids[0], 1: pids[0], 2: pids[1]}
    assert verify(job.folder).problems == ()


@pytest.mark.nightly
@needs_deepspeed
@pytest.mark.usefixtures("own_ray")
def test_a_run_begins_under_one_way_and_ends_under_others(place: Path) -> None:
    whole = job_for(place, "whole")
    run(whole, stages=2)
    shutil.copytree(place / "whole", place / "mixed")
    job = job_for(place, "mixed")
    folder = LocalFolder(place / "mixed")
    # What a crash may leave: some shards of each window, by one way of spreading the model, and no coordinates.
    for entry in list(folder.list("commits")):
        if "resid_post_mean.001" in entry.key or "000003/resid_post_mean" in entry.key or "coordinates" in entry.key:
            folder.delete(entry.key)
    for unit in range(4):
        folder.delete(f"activations.zarr/resid_post_mean/c/{unit}/1/0")
    for group in range(3):
        folder.delete(f"activations.zarr/resid_post_mean/c/3/{group}/0")
    run(job, **WAYS["gang of 2"])
    assert max(error_L.max() for error_L in errors(job, place / "model").values()) <= 1e-5
    assert verify(job.folder).problems == ()


GENERATED = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [ghost], prompts: 1, max_questions: 4}}
generate: {{max_new_tokens: 8, batch_rows: 8}}
store: {{root: {root}, run: {run}, unit_rows: 4}}
"""


def texts(place: Path, run: str, **config: Any) -> list[tuple[int, ...]]:
    """Generate, and return the responses' tokens by row."""
    file = place / f"{run}.yaml"
    file.write_text(GENERATED.format(model=place / "model", root=place, run=run))
    job = job_of(load_config(file))
    with hold_run(job, say=print) as fence:
        generate(job, fence, ClusterConfig(device="cpu", **config), lambda _: None)
    return [tuple(entry["response_token_ids"]) for entry in read_rollouts(job.folder).to_pylist()]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.usefixtures("own_ray")
def test_generating_gives_the_same_text_whole_in_a_gang_and_offloaded(place: Path) -> None:
    whole = texts(place, "text-whole")
    assert len(set(whole)) > 4
    assert texts(place, "text-gang", sharding="tensor", ranks=2) == whole
    assert texts(place, "text-offloaded", generation="offload", offload_to="disk") == whole


def test_shares_cover_every_layer_once(place: Path) -> None:
    job = job_for(place, "never-run")
    for way, config in WAYS.items():
        actors = config.get("stages") or config.get("ranks") or 1
        shares = extraction_shares(job, ClusterConfig(**config), actors)
        assert [layer for share in shares for layer in share.written] == list(range(6)), way
        ran = [(share.first, share.stop) for share in shares]
        assert ran == [(s.written.start, s.written.stop) for s in shares] if "pipeline" in way else set(ran) == {(0, 6)}
    wide = extraction_shares(job, ClusterConfig(sharding="tensor"), 5)
    assert [len(share.written) for share in wide] == [2, 2, 2, 0, 0]


def test_the_size_of_a_gang_is_that_of_a_node_or_asked_for() -> None:
    node = Node(id="a", address="", cpus=64, gpus=8, memory=0, object_store=0)
    cluster = ClusterConfig(sharding="tensor")
    assert gang_size(cluster, [node]) == 8
    with pytest.raises(InputError, match=r"^cluster\.ranks: give the number of ranks of a gang, 2 or more; "):
        gang_size(ClusterConfig(sharding="tensor", device="cpu"), [node])
