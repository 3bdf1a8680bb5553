"""Every node must see the store before work starts: a cluster of several nodes, one of them behind another mount."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from personaspace.cluster.nodes import check_nodes
from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


def test_nodes_that_see_the_store_pass(cluster: Cluster, tmp_path: Path) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    folder = LocalFolder(tmp_path / "run")
    folder.put_new("run.json", b"{}")
    check_nodes(folder)
    assert [entry.key for entry in folder.list()] == ["run.json"]


def test_a_node_that_does_not_see_the_store_is_named(cluster: Cluster, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    folder.put_new("run.json", b"{}")
    start = f"{Path(sys.executable).parent}/ray start --address={cluster.address} --num-cpus=1 --block"
    # A mount namespace of its own hides the folder from this node only.
    hidden = subprocess.Popen(
        ["unshare", "-m", "bash", "-c", f"mount -t tmpfs none {folder.path} && exec {start}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        deadline = time.monotonic() + 30
        while sum(node["Alive"] for node in ray.nodes()) < 3:
            if hidden.poll() is not None:
                pytest.skip("this machine does not let a test mount anything (needs root)")
            assert time.monotonic() < deadline, "the third node never joined"
            time.sleep(0.5)
        with pytest.raises(InputError, match=r"can't be read on 1 of 3 nodes:\n.* it is not there") as refused:
            check_nodes(folder)
        assert "No work was started" in str(refused.value)
    finally:
        if hidden.poll() is None:
            os.killpg(hidden.pid, 15)
        hidden.wait()
