"""What `model.dtype: auto` stands for in a run: settled once, before identity, so that nothing behind sees `auto`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.replicas import alive_nodes
from personaspace.cluster.room import chosen_device
from personaspace.cluster.session import ray_address, ray_cluster
from personaspace.extract.config import Dtype, ModelConfig
from personaspace.extract.precision import cpu_computes_bfloat16
from personaspace.extract.shape import BYTES_OF
from personaspace.store.errors import InputError
from personaspace.store.manifest import read_manifest
from personaspace.store.objects import Folder

PATIENCE = 120.0
"""Seconds that nodes have for naming what their CPU can do; starting a worker and loading torch takes most of them."""


def settle_dtype(
    model: ModelConfig, cluster: ClusterConfig, folder: Folder, say: Callable[[str], None] = print
) -> ModelConfig:
    """``model`` with a dtype that is not `auto`, for the run in ``folder``: what the run was begun with, if it exists.

    Raises InputError where the cluster to join does not answer.
    """
    if model.dtype != "auto":
        return model
    existing = read_manifest(folder)
    stored = None if existing is None else existing.identity["model"]["dtype"]
    dtype = next((known for known in BYTES_OF if known == stored), None)
    if dtype is not None:
        why = "as the run was begun"
    else:
        dtype, why = _dtype_of_machines(cluster)
    say(f"model.dtype: auto is {dtype} here, {why}")
    return replace(model, dtype=dtype)


def choose_dtype(device: str, cluster: ClusterConfig) -> tuple[Dtype, str]:
    """What `auto` stands for where actors work on ``device`` (`cpu` or `cuda`), and why.

    On CPUs every node has to compute in bfloat16: those of the cluster that the config joins, which this process has
    to be connected to, else this machine. Raises InputError for nodes that don't answer.
    """
    if device == "cuda":
        return "bfloat16", "since GPUs do the work"
    joined = ray_address(cluster) is not None
    if _nodes_without_bfloat16() if joined else not cpu_computes_bfloat16():
        return "float32", f"since {'CPUs of the cluster do' if joined else 'this CPU does'} not compute in bfloat16"
    return "bfloat16", f"since {'all CPUs of the cluster compute' if joined else 'this CPU computes'} in it"


def _dtype_of_machines(cluster: ClusterConfig) -> tuple[Dtype, str]:
    if ray_address(cluster) is None:
        return choose_dtype("cuda" if cluster.device != "cpu" and torch.cuda.is_available() else "cpu", cluster)
    with ray_cluster(cluster):
        return choose_dtype(chosen_device(alive_nodes(), cluster.device), cluster)


def _nodes_without_bfloat16() -> int:
    """How many of the nodes that have CPUs for actors can't compute in bfloat16."""
    ask = cast(Any, ray.remote(num_cpus=0, max_retries=0)(cpu_computes_bfloat16))
    answers = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)).remote()
        for node in alive_nodes()
        if node.cpus
    ]
    try:
        return sum(not answer for answer in ray.get(answers, timeout=PATIENCE))
    except RayError as error:
        raise InputError(
            f"model.dtype: auto, and nodes of the cluster did not say what their CPUs can do ({error}). "
            "Give bfloat16 or float32."
        ) from error
