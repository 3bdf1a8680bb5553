"""Every node must see the store and the model before work starts: several nodes, one of them behind another mount."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from personaspace.cluster.nodes import Files, check_nodes, difference, model_files
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from tests.models import tiny_checkpoint


def test_what_differs_in_a_model_s_folder_is_told(tmp_path: Path) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path / "model"))))
    files = model_files(checkpoint)
    assert files is not None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files.sizes)
    assert difference(files) is None
    size = files.sizes["config.json"]
    (tmp_path / "model" / "config.json").write_text("{}")
    assert difference(files) == f"its config.json has 2 bytes, and {size} on the driver's node"
    (tmp_path / "model" / "config.json").unlink()
    assert difference(files) == "it holds no config.json"
    assert difference(replace(files, folder=str(tmp_path / "elsewhere"))) == "it is not there"
    # What the hub gives, every node fetches for itself.
    assert model_files(replace(checkpoint, source="org/model", revision="abc")) is None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


@contextmanager
def node_that_does_not_see(folder: Path, cluster: Cluster) -> Iterator[None]:
    """A third node, with a mount namespace of its own that hides a folder from this node only."""
    start = f"{Path(sys.executable).parent}/ray start --address={cluster.address} --num-cpus=1 --block"
    hidden = subprocess.Popen(
        ["unshare", "-m", "bash", "-c", f"mount -t tmpfs none {folder} && exec {start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) < 3:
            if hidden.poll() is not None:
                pytest.skip("this machine does not let a test mount anything (needs root)")
            assert time.monotonic() < deadline, "the third node never joined"
            time.sleep(0.5)
        yield
    finally:
        if hidden.poll() is None:
            os.killpg(hidden.pid, 15)
        hidden.wait()


@pytest.mark.slow
def test_a_node_that_does_not_see_store_or_model_is_named(cluster: Cluster, tmp_path: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    (tmp_path / "hidden").mkdir()
    folder = LocalFolder(tmp_path / "run")
    hidden = LocalFolder(tmp_path / "hidden" / "run")
    for run in (folder, hidden):
        run.put_new("run.json", b"{}")
    model = tmp_path / "hidden" / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    files = Files(folder=str(model), sizes={"config.json": 2})

    check_nodes(folder, files)
    assert [entry.key for entry in folder.list()] == ["run.json"]

    with node_that_does_not_see(tmp_path / "hidden", cluster):
        check_nodes(folder)
        with pytest.raises(InputError) as refused:
            check_nodes(hidden, files)
    store, node, advice, lacking, other, copy, end = str(refused.value).splitlines()
    assert store == f"store.root: {hidden.url} can't be read on 1 of 3 nodes:"
    assert node.endswith("it is not there: the path is not shared, or something else is mounted at it")
    assert advice.startswith("Use a path that is mounted on all nodes, or an object store")
    assert lacking == f"model.id: {model} is not the same on 1 of 3 nodes:"
    assert other.endswith(": it is not there")
    assert copy.startswith("Put the model into a folder that all nodes share")
    assert end == "No work was started."
    assert [entry.key for entry in hidden.list()] == ["run.json"]


@pytest.mark.nightly
def test_a_node_that_goes_meanwhile_is_not_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    folder = LocalFolder(tmp_path / "run")
    folder.put_new("run.json", b"{}")
    gone = cluster.add_node(num_cpus=1)
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    gone.all_processes["raylet"][0].process.kill()
    assert sum(node["Alive"] for node in ray.nodes()) == 3, "nobody has noticed yet"
    check_nodes(folder)
