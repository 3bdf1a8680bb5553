"""Machines to plan for: as flags describe them, as a live Ray cluster has them, or this one."""

import os
from dataclasses import dataclass, replace

import psutil
import ray
import torch

from personaspace.cluster import room
from personaspace.cluster.planning.machines import GPUS, Device, GiB, Machines, Node, find_gpu, parse_bytes
from personaspace.cluster.replicas import alive_nodes
from personaspace.store.errors import InputError

HOST_MEMORY = 1000 * GiB
"""Of a GPU node that is only described."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What the flags of `personaspace plan` say of the machines; None where they say nothing."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    gpu_memory: str | None = None
    host_memory: str | None = None
    flops: float | None = None
    """FLOP per second of one device at best."""
    bandwidth: float | None = None
    """Bytes per second of its memory at best."""

    @property
    def names_machines(self) -> bool:
        """Whether they describe machines, and not only change what is found."""
        return self.nodes is not None or self.gpus_per_node is not None


def described_machines(flags: Description) -> Machines:
    """The machines that the flags describe. Raises InputError for numbers that can't be."""
    for name, count in (("--nodes", flags.nodes), ("--gpus-per-node", flags.gpus_per_node)):
        if count is not None and count < 1:
            raise InputError(f"{name}: {count}; give 1 or more.")
    device = _changed(_gpu(flags.gpu or "H100", flags), flags)
    host = HOST_MEMORY if flags.host_memory is None else parse_bytes(flags.host_memory)
    node = Node(devices=flags.gpus_per_node or 8, memory_bytes=host)
    return Machines(nodes=(node,) * (flags.nodes or 1), device=device, source="as described by flags")


def live_machines(flags: Description) -> Machines:
    """The nodes of the Ray cluster that this process is connected to. Raises InputError if its GPUs are not known."""
    nodes = alive_nodes()
    with_gpus = [node for node in nodes if node.gpus]
    if with_gpus:
        types = _gpu_types()
        if len(types) > 1 and flags.gpu is None:
            raise InputError(
                f"The cluster has GPUs of {len(types)} kinds ({', '.join(sorted(types))}); say --gpu NAME."
            )
        device = _changed(_gpu(flags.gpu or next(iter(types), "of unknown type"), flags), flags)
        found = tuple(Node(devices=int(node.gpus), memory_bytes=_memory(node)) for node in with_gpus)
        return Machines(nodes=found, device=device, source="live Ray cluster")
    found = tuple(Node(devices=int(node.cpus), memory_bytes=_memory(node)) for node in nodes if node.cpus >= 1)
    if not found:
        raise InputError("The Ray cluster has neither GPUs nor CPUs for actors; start its nodes with --num-cpus.")
    return Machines(nodes=found, device=_core(found, flags), source="live Ray cluster")


def this_machine(flags: Description) -> Machines:
    """The machine that this process runs on."""
    memory = psutil.virtual_memory().total
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = _gpu(flags.gpu or properties.name, flags)
        device = _changed(replace(found, memory_bytes=properties.total_memory), flags)
        node = Node(devices=torch.cuda.device_count(), memory_bytes=memory)
        return Machines(nodes=(node,), device=device, source="this machine")
    nodes = (Node(devices=os.cpu_count() or 1, memory_bytes=memory),)
    return Machines(nodes=nodes, device=_core(nodes, flags), source="this machine")


def _gpu(name: str, flags: Description) -> Device:
    known = find_gpu(name)
    if known is not None:
        return known
    if flags.gpu_memory is None or flags.flops is None or flags.bandwidth is None:
        raise InputError(
            f"--gpu: {name!r} is not known here. Known: {', '.join(GPUS)}. For others give --gpu-memory (such as "
            "80GiB), --flops (FLOP per second at best, dense, 16 bits) and --bandwidth (bytes per second)."
        )
    return Device(name=name, kind="cuda", memory_bytes=0, flops=0.0, bandwidth=0.0)


def _changed(device: Device, flags: Description) -> Device:
    return replace(
        device,
        memory_bytes=device.memory_bytes if flags.gpu_memory is None else parse_bytes(flags.gpu_memory),
        flops=flags.flops or device.flops,
        bandwidth=flags.bandwidth or device.bandwidth,
    )


def _core(nodes: tuple[Node, ...], flags: Description) -> Device:
    """A CPU core with its share of the memory; what it does in a second is measured, if not stated."""
    memory = min(node.memory_bytes // node.devices for node in nodes)
    return Device(
        name="CPU core",
        kind="cpu",
        memory_bytes=memory,
        flops=flags.flops or 0.0,
        bandwidth=flags.bandwidth or 0.0,
    )


def _gpu_types() -> set[str]:
    """Names of the cluster's GPUs, as Ray detects them."""
    prefix = "accelerator_type:"
    return {key.removeprefix(prefix) for key in ray.cluster_resources() if key.startswith(prefix)}


def _memory(node: room.Node) -> int:
    """Of a node: what Ray lends to workers, and its object store."""
    return int(node.memory + node.object_store)
