"""What an actor gets of the cluster, and how many replicas there is room for: arithmetic on the nodes, without Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

from personaspace.cluster.config import Device
from personaspace.store.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine of the cluster, as Ray counts its resources."""

    id: str
    address: str
    cpus: float
    gpus: float
    memory: float
    """Bytes for workers."""
    object_store: float
    """Bytes of shared memory for objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What each actor gets."""

    device: str
    """`cpu` or `cuda`."""
    cpus: float
    """Less than one where there are more actors than CPUs."""
    gpus: int

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """Its resources, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """What a Dask worker gets of a node."""

    node: str
    """Id of the node."""
    threads: int
    """Tasks at a time, and CPUs."""
    memory: int
    """Bytes."""


def chosen_device(nodes: Sequence[Node], device: Device) -> str:
    """`cuda` or `cpu`. Raises InputError for a GPU that is asked for and that no node has."""
    with_gpus = any(node.gpus for node in nodes)
    if device == "cuda" and not with_gpus:
        raise InputError("cluster.device: cuda, and no node of the cluster has a GPU; set it to cpu or auto.")
    return "cuda" if with_gpus and device != "cpu" else "cpu"


def share(nodes: Sequence[Node], device: Device, actors: int, replicas: int | None) -> Workers:
    """Divide the nodes among replicas of so many actors.

    On GPUs each actor gets one, with the CPUs that a GPU of the poorest node has beside it. On CPUs the actors of a
    node share it evenly: one replica on each, or as many as ``replicas`` asks for. Raises InputError for a cluster
    without CPUs, or without the GPUs that ``device`` asks for.
    """
    if not any(node.cpus for node in nodes):
        raise InputError("cluster: it has no CPUs for actors; start its nodes with --num-cpus.")
    if chosen_device(nodes, device) == "cuda":
        with_gpus = [node for node in nodes if node.gpus]
        return Workers(device="cuda", cpus=_whole(min(node.cpus / node.gpus for node in with_gpus)), gpus=1)
    with_cpus = [node for node in nodes if node.cpus]
    per_node = actors * -(-(replicas or len(with_cpus)) // len(with_cpus))
    return Workers(device="cpu", cpus=_whole(min(node.cpus for node in with_cpus) / per_node), gpus=0)


def room(nodes: Sequence[Node], workers: Workers, actors: int) -> int:
    """Replicas of so many actors that fit into the nodes, whatever else runs there."""
    fitting = 0
    for node in nodes:
        by_cpu = int(node.cpus / workers.cpus + 1e-6) if workers.cpus else actors
        fitting += min(by_cpu, int(node.gpus) // workers.gpus) if workers.gpus else by_cpu
    return fitting // actors


def fit_in_flight(nodes: Sequence[Node], stages: int, state_bytes: int) -> int:
    """Micro-batches on their way through a pipeline: twice the stages, unless their hidden states, of ``state_bytes``
    each, would fill half of the smallest object store."""
    smallest = min((node.object_store for node in nodes if node.object_store), default=float("inf"))
    return max(1, min(2 * stages, int(smallest / 2 / state_bytes) if state_bytes else 2 * stages))


def seats(nodes: Sequence[Node], workers: int | None) -> list[Seat]:
    """Seats for so many Dask workers, or for as many as there are nodes with CPUs.

    Each worker goes where it gets the most CPUs; those of one node share its CPUs and its memory evenly. Raises
    InputError where there are more workers than CPUs.
    """
    cpus = {node.id: int(node.cpus) for node in nodes if node.cpus >= 1}
    wanted = len(cpus) if workers is None else workers
    if wanted > sum(cpus.values()):
        raise InputError(
            f"cluster.analysis_workers: {wanted} Dask worker(s), and the cluster has {sum(cpus.values())} CPU(s); each "
            "needs one. Ask for fewer, or for 0: the threads of the driver's machine."
        )
    on_node = dict.fromkeys(cpus, 0)
    for _ in range(wanted):
        on_node[max(cpus, key=lambda node: cpus[node] // (on_node[node] + 1))] += 1
    return [
        Seat(node=node.id, threads=cpus[node.id] // on_node[node.id], memory=int(node.memory / on_node[node.id]))
        for node in nodes
        if node.id in on_node
        for _ in range(on_node[node.id])
    ]


def _whole(cpus: float) -> float:
    return float(int(cpus)) if cpus >= 1 else cpus
