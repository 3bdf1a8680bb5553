"""How many stages a pipeline needs where the config leaves it open: as few as the memory of a device allows."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import ray
import torch

from personaspace.cluster.job import Job
from personaspace.cluster.planning.costs import first_layers
from personaspace.cluster.planning.fitting import MicroBatchLoad, fit_stages, fuses_attention
from personaspace.cluster.room import Node
from personaspace.extract.counting import count_shape
from personaspace.store.errors import InputError

SHORTEST = 64
"""Tokens of a short rollout: how many fit a micro-batch decides how many sums are kept of it."""
PATIENCE = 60.0
"""Seconds for a free GPU to answer."""


@ray.remote(num_gpus=1, num_cpus=0, max_retries=0)
def gpu_memory() -> int:
    """On a node with a free GPU: its memory in bytes."""
    return int(torch.cuda.get_device_properties(0).total_memory)


def fewest_stages(job: Job, nodes: Sequence[Node], device: str) -> int:
    """Stages of a replica. Raises InputError if not even one layer group fits a device, or no GPU is free to tell."""
    kind: Literal["cuda", "cpu"] = "cuda" if device == "cuda" else "cpu"
    if kind == "cuda":
        answered, _ = ray.wait([cast(Any, gpu_memory).remote()], timeout=PATIENCE)
        if not answered:
            raise InputError(
                f"cluster.stages: no GPU was free within {PATIENCE:.0f} s to tell its memory; give a number of stages."
            )
        memory = int(ray.get(answered[0]))
    else:
        memory = int(min(node.memory for node in nodes if node.cpus))
    return stages_for(job, memory, kind)


def stages_for(job: Job, memory_bytes: int, kind: Literal["cuda", "cpu"]) -> int:
    """Stages for devices with so much memory each. Raises InputError if not even one layer group fits."""
    layout, extract = job.layout, job.extract
    shape = first_layers(
        # Of the commit that the run is pinned to.
        count_shape(job.checkpoint.config(), job.checkpoint.name, trust_remote_code=job.model.trust_remote_code),
        layout.group_layers(job.groups_run - 1).stop,
    )
    load = MicroBatchLoad(
        tokens=extract.micro_batch_tokens,
        longest=min(extract.micro_batch_tokens, job.checkpoint.max_positions or extract.micro_batch_tokens),
        segments=-(-extract.micro_batch_tokens // SHORTEST) * len(extract.reductions) * len(extract.sites),
        fused_attention=fuses_attention(shape, job.model.attention),
    )
    stages = fit_stages(shape, job.model.settled_dtype, load, memory_bytes, layout.layer_group, kind)
    if stages is None:
        raise InputError(
            f"cluster.stages: not even {layout.layer_group} layers of {job.checkpoint.name} fit a device with "
            f"{memory_bytes / 1e9:.0f} GB, beside a micro-batch of {extract.micro_batch_tokens} tokens. Set "
            "cluster.sharding to `tensor` or `offload`."
        )
    return stages
