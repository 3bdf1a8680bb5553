"""Dividing a cluster among actors."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.cluster.room import Node, fit_in_flight, room, seats, share
from personaspace.store.errors import InputError


def node(cpus: float, gpus: float = 0, object_store: float = 1e9, name: str = "n") -> Node:
    return Node(id=name, address="10.0.0.1", cpus=cpus, gpus=gpus, memory=1e10, object_store=object_store)


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


@given(cpus=st.lists(st.integers(0, 64), min_size=1, max_size=5), workers=st.none() | st.integers(0, 20))
def test_dask_workers_share_the_cpus_and_the_memory_of_their_nodes(cpus: list[int], workers: int | None) -> None:
    machines = [node(count, name=str(number)) for number, count in enumerate(cpus)]
    if workers is not None and workers > sum(cpus):
        message = (
            f"cluster.analysis_workers: {workers} Dask worker(s), and the cluster has {sum(cpus)} CPU(s); each needs "
            "one. Ask for fewer, or for 0: the threads of the driver's machine."
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            seats(machines, workers)
        return
    found = seats(machines, workers)
    assert len(found) == (workers if workers is not None else sum(count > 0 for count in cpus))
    assert all(seat.threads >= 1 for seat in found)
    for machine in machines:
        here = [seat for seat in found if seat.node == machine.id]
        assert sum(seat.threads for seat in here) <= machine.cpus
        assert sum(seat.memory for seat in here) <= machine.memory


def test_each_node_has_a_dask_worker_and_a_small_head_has_none() -> None:
    workers = [node(96, name=str(number)) for number in range(4)]
    assert [(seat.node, seat.threads) for seat in seats(workers, None)] == [(str(number), 96) for number in range(4)]
    with_head = [node(2, name="head"), *workers]
    threads = {seat.node: seat.threads for seat in seats(with_head, None)}
    assert threads == {"0": 48, "1": 96, "2": 96, "3": 96}
    assert seats([node(0)], None) == []
