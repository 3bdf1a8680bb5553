"""Machines to plan for, as a live Ray cluster has them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from personaspace.cluster.planning.described import Description, live_machines
from personaspace.store.errors import InputError


@pytest.fixture
def start() -> Iterator[Callable[..., None]]:
    """Starts a cluster of the nodes given, and connects to it."""
    clusters: list[Cluster] = []

    def make(*nodes: dict[str, Any]) -> None:
        cluster = Cluster()
        clusters.append(cluster)
        for node in nodes:
            cluster.add_node(object_store_memory=100 * 2**20, memory=2**30, **node)
        ray.init(address=cluster.address, log_to_driver=False)

    yield make
    ray.shutdown()
    for cluster in clusters:
        cluster.shutdown()


def test_gpus_of_a_live_cluster(start: Callable[..., None]) -> None:
    gpus = {"num_cpus": 4, "num_gpus": 4, "resources": {"accelerator_type:H100": 1}}
    start({"num_cpus": 2, "num_gpus": 0}, gpus, gpus)
    machines = live_machines(Description())
    assert machines.describe() == "2 nodes x 4 H100 of 79.1 GiB (live Ray cluster)"
    assert machines.nodes[0].memory_bytes == 2**30 + 100 * 2**20
    assert live_machines(Description(gpu_memory="60GiB")).device.memory_bytes == 60 * 2**30


def test_gpus_that_ray_can_not_name_must_be_named(start: Callable[..., None]) -> None:
    start({"num_cpus": 1, "num_gpus": 1})
    with pytest.raises(InputError, match=r"--gpu: 'of unknown type' is not known here\. .* give --gpu-memory"):
        live_machines(Description())
    assert live_machines(Description(gpu="B200")).device.name == "B200"


def test_a_live_cluster_without_gpus_is_one_of_cores(start: Callable[..., None]) -> None:
    start({"num_cpus": 2}, {"num_cpus": 3})
    machines = live_machines(Description())
    assert (machines.device.kind, machines.devices) == ("cpu", 5)
