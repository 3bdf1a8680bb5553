"""A Ray cluster of this folder's own: started once, joined and left again by the drivers of its tests."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.session import ray_cluster


# Of the session: pytest-xdist deals files out by their length, and would leave and enter this folder all the time.
@pytest.fixture(scope="session")
def ray_head() -> Iterator[str]:
    """Address of a cluster of one node with two CPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def own_ray(ray_head: str) -> Iterator[None]:
    """This process drives the cluster, by the project's own session code."""
    with ray_cluster(ClusterConfig(address=ray_head)):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def commands_join(ray_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of this test join the cluster, as in `ray job submit`."""
    monkeypatch.setenv("RAY_ADDRESS", ray_head)
