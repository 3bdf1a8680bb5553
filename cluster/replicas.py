"""Replicas as Ray has them: actors in a placement group, which live and die together."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from personaspace.cluster.events import Loaded
from personaspace.cluster.room import Node, Workers

MakeActor = Callable[[int, dict[str, Any]], Any]
"""Starts the actor of a place in the replica, with these Ray options."""
LoadActors = Callable[[Sequence[Any]], Sequence[Any]]
"""Has a replica's actors load their model; one reference each, to an `events.Loaded`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Formation:
    """How a step's replicas are made."""

    actors: int
    workers: Workers
    together: bool
    """All on one node, or not at all; else on as few nodes as possible."""
    make: MakeActor
    load: LoadActors
    connect: Callable[[Sequence[Any]], None] | None = None
    """Called with a replica's actors, once all have loaded."""


@dataclass(slots=True, eq=False)
class Replica:
    """One of them, from its request to its end."""

    number: int
    group: PlacementGroup
    actors: list[Any]
    loading: list[Any]
    """References to what its actors say once they are ready."""
    placed: bool = False
    active: bool = False
    unanswered: int = 0
    """Calls."""
    heard: float = field(default_factory=time.monotonic)
    """When it was last heard of, or last had nothing to do."""
    nodes: frozenset[str] = frozenset()
    """That its actors lie on, once it is placed."""
    asked: float = field(default_factory=time.monotonic)
    """When it was asked for."""


def start_replica(number: int, formation: Formation) -> Replica:
    """Ask for a replica. Ray makes it once there is room."""
    strategy: Literal["STRICT_PACK", "PACK"] = "STRICT_PACK" if formation.together else "PACK"
    group = placement_group([formation.workers.bundle] * formation.actors, strategy=strategy)
    actors = [
        formation.make(
            place,
            {
                "num_cpus": formation.workers.cpus,
                "num_gpus": formation.workers.gpus,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            },
        )
        for place in range(formation.actors)
    ]
    return Replica(number=number, group=group, actors=actors, loading=list(formation.load(actors)))


def placed_on(replica: Replica) -> frozenset[str]:
    """Nodes that Ray has found for the replica; none as long as there is no room."""
    table = placement_group_table(replica.group)
    return frozenset(table["bundles_to_node_id"].values()) if table["state"] == "CREATED" else frozenset()


def end_replica(replica: Replica) -> None:
    """End its actors at once, whatever they do, and free what they hold. A stopped process dies, too."""
    for actor in replica.actors:
        ray.kill(actor)
    remove_placement_group(replica.group)


def loaded(begin: float) -> Loaded:
    """In a worker: it is ready, and ``begin`` (monotonic seconds) is when it began to load."""
    return Loaded(
        node=ray.get_runtime_context().get_node_id(),
        pid=os.getpid(),
        seconds=time.monotonic() - begin,
        resident=psutil.Process().memory_info().rss,
    )


def alive_nodes() -> list[Node]:
    """The cluster's machines as they are now."""
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            memory=node["Resources"].get("memory", 0.0),
            object_store=node["Resources"].get("object_store_memory", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
