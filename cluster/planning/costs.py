"""What work costs in FLOP, bytes and seconds: the terms that the plans of the steps share. Pure functions.

With P parameters that a token meets, A the width of all query heads and T tokens of a rollout, a block takes
2 P + 2 T A FLOP for each token: products of weights (Kaplan et al., arXiv 2001.08361, section 2.1), and of causal
attention.
"""

import math
from dataclasses import dataclass, replace

from personaspace.cluster.config import Sharding
from personaspace.cluster.planning.fitting import MicroBatchLoad
from personaspace.cluster.planning.machines import Machines
from personaspace.cluster.planning.workload import Workload
from personaspace.extract.shape import ModelShape

HANDOVER = 4e9
"""Bytes per second of hidden states from stage to stage as Ray objects. An assumption."""
ALL_REDUCE = 150e9
"""Bytes per second of all-reduce within a node. An assumption, for NVLink."""
HOST_LINK = 25e9
"""Bytes per second from host memory to a GPU: PCIe 4 with 16 lanes, in practice."""
DISK = 1e9
"""Bytes per second from a node's disk: loading a checkpoint (its workers share what is read), and offload to disk. An
assumption."""
ENCODING = 200e6
"""Bytes of float32 that one process encodes and writes in a second, measured: docs/benchmarks.md."""
START_SECONDS = 10.0
"""Of a step before its first micro-batch, besides loading: workers import torch and check themselves. Measured on two
cores."""
HOST_SHARE = 0.5
"""Share of a node's memory that a run may fill: Ray's object store takes 30% by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a config says of the cluster; None where the plan may choose."""

    stages: int | None = None
    replicas: int | None = None
    """Copies of the model, in both steps."""
    in_flight: int | None = None
    """Micro-batches on their way through a replica at once."""
    sharding: Sharding = "pipeline"


def forward_flop(shape: ModelShape, first: int, stop: int, tokens: float) -> float:
    """FLOP of one token through blocks ``[first, stop)``, in a rollout of ``tokens``."""
    attention = 2 * tokens * shape.heads * shape.head_dim
    return sum(2 * shape.active_parameters[layer] + attention for layer in range(first, stop))


def micro_batch_load(work: Workload, fused_attention: bool) -> MicroBatchLoad:
    """What a micro-batch of this work asks of a stage."""
    return MicroBatchLoad(
        tokens=max(work.micro_batch_tokens, work.longest),
        longest=work.longest,
        segments=math.ceil(work.micro_batch_tokens / work.rollout_tokens) * work.segments * work.sites,
        fused_attention=fused_attention,
    )


def first_layers(shape: ModelShape, layers: int) -> ModelShape:
    """The model without what lies behind its first ``layers`` blocks."""
    return replace(
        shape,
        layers=layers,
        block_parameters=shape.block_parameters[:layers],
        active_parameters=shape.active_parameters[:layers],
    )


def devices_each(machines: Machines, workers: int) -> float:
    """Devices of each worker: one GPU, or an even share of its node's cores (cluster/room.py shares them so)."""
    if machines.device.kind == "cuda":
        return 1.0
    share = min(node.devices for node in machines.nodes) / workers_per_node(workers, machines)
    return math.floor(share) if share >= 1 else share


def workers_per_node(workers: int, machines: Machines) -> int:
    """Workers on the busiest node, of those that are spread evenly."""
    return math.ceil(workers / len(machines.nodes))


def fetching(weights: int, workers: int, machines: Machines) -> float:
    """Bytes of offloaded weights per second: from the host's memory if it holds them for each worker, else from disk,
    which the node's workers share."""
    here = workers_per_node(workers, machines)
    if weights * here <= HOST_SHARE * min(node.memory_bytes for node in machines.nodes):
        return HOST_LINK
    return DISK / here


def offload_workers(machines: Machines, asked: int | None, most: int) -> list[int]:
    """Numbers of workers to choose from where each fetches a whole model: as many on each node."""
    if asked is not None:
        return [min(asked, most)]
    per_node = max(node.devices for node in machines.nodes)
    return sorted({min(count * len(machines.nodes), machines.devices, most) for count in range(1, per_node + 1)})
