"""Dividing a cluster among actors."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.cluster.room import Node, fit_in_flight, room, share
from personaspace.store.errors import InputError


def node(cpus: float, gpus: float = 0, object_store: float = 1e9) -> Node:
    return Node(id="n", address="10.0.0.1", cpus=cpus, gpus=gpus, memory=1e10, object_store=object_store)


nodes = st.lists(st.builds(node, st.integers(1, 64), st.integers(0, 8)), min_size=1, max_size=5)


@given(nodes=nodes, actors=st.integers(1, 6), replicas=st.none() | st.integers(1, 8))
def test_on_cpus_as_many_replicas_fit_as_are_asked_for(nodes: list[Node], actors: int, replicas: int | None) -> None:
    workers = share(nodes, "cpu", actors, replicas)
    assert workers.cpus > 0
    assert workers.threads >= 1
    assert room(nodes, workers, actors) >= (replicas or len(nodes))


@given(nodes=nodes, actors=st.integers(1, 6))
def test_on_gpus_no_more_replicas_fit_than_there_are_gpus(nodes: list[Node], actors: int) -> None:
    gpus = int(sum(node.gpus for node in nodes))
    if not gpus:
        return
    workers = share(nodes, "auto", actors, None)
    assert (workers.device, workers.gpus) == ("cuda", 1)
    assert room(nodes, workers, actors) == gpus // actors


def test_one_machine_is_shared_evenly() -> None:
    assert share([node(8)], "auto", actors=2, replicas=1).cpus == 4
    assert share([node(2)], "auto", actors=3, replicas=1).cpus == pytest.approx(2 / 3)
    assert share([node(8), node(8)], "auto", actors=2, replicas=None).cpus == 4


def test_a_gpu_that_is_not_there_is_refused() -> None:
    message = "cluster.device: cuda, and no node of the cluster has a GPU; set it to cpu or auto."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        share([node(8)], "cuda", actors=1, replicas=1)
    with pytest.raises(InputError, match=r"^cluster: it has no CPUs for actors; start its nodes with --num-cpus\.$"):
        share([node(0)], "auto", actors=1, replicas=1)


def test_micro_batches_in_flight_leave_room_in_the_object_stores() -> None:
    assert fit_in_flight([node(8, object_store=30e9)], stages=3, state_bytes=int(0.27e9)) == 6
    assert fit_in_flight([node(8, object_store=30e9), node(8, object_store=2e9)], 3, state_bytes=int(0.27e9)) == 3
    assert fit_in_flight([node(8, object_store=1e8)], stages=3, state_bytes=int(0.27e9)) == 1
