"""Which engine generates: what it needs of the cluster, what can't be, and how an actor comes to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from personaspace.cluster.config import ClusterConfig, Generation
from personaspace.cluster.gang import Gang
from personaspace.cluster.room import Node, Workers
from personaspace.cluster.session import ray_address, share_cluster
from personaspace.cluster.sharding import gang_size, generation_sharding
from personaspace.cluster.shards import ShardWriter
from personaspace.cluster.tensor import load_causal_lm_parallel
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import AuditorConfig, GenerateConfig, ModelConfig, VllmConfig
from personaspace.extract.endpoint import LONGEST_PAUSE, Endpoint, check_endpoint
from personaspace.extract.generate.ending import checkpoint_stop_ids
from personaspace.extract.generate.engine import Engine
from personaspace.extract.generate.openai_engine import KEY, OpenAIEngine
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.generate.vllm_engine import VllmEngine, check_vllm
from personaspace.extract.hooks import LayerHook
from personaspace.extract.offload import Offload, load_causal_lm_offloaded
from personaspace.store.errors import InputError
from personaspace.store.lease import Fence


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSpec:
    """What a generator actor is made from."""

    checkpoint: Checkpoint
    model: ModelConfig
    config: GenerateConfig
    auditor: AuditorConfig
    """Who is the user in conversations of several turns."""
    vllm: VllmConfig
    fence: Fence
    sharding: Generation
    rank: int
    """Of the actor in a gang; else 0."""
    ranks: int
    """Processes that hold the model together: actors of a gang, or vLLM's own in one actor."""
    offload: Offload | None
    capture: ShardWriter | None
    """Writes what is captured; None where nothing is."""
    hooks: tuple[LayerHook, ...]
    """Changes to the residual stream."""
    device: str
    threads: int
    """Of the actor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crew:
    """What a replica that generates consists of."""

    actors: int
    workers: Workers
    """What each actor gets."""
    ranks: int
    """As in GeneratorSpec."""
    sharding: Generation
    name: str
    """How the model lies on it, for people."""
    replicas: int | None = None
    """How many there are where the config leaves it open; None: as many as there is room for."""
    stall_timeout: float = 0.0
    """Seconds without an answer that are nothing unusual for it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the actors, by Ray's names."""


def check_engine(generate: GenerateConfig, cluster: ClusterConfig) -> None:
    """Raise InputError for an engine that can't be used so, before any work."""
    engine = generate.engine
    if generate.responses is not None and engine != "transformers":
        raise InputError(
            f"generate.engine: {engine} has no effect together with generate.responses, where nothing is sampled. "
            "Remove one of the two."
        )
    if engine != "transformers" and generate.batching != "static":
        raise InputError(
            f"generate.batching: {generate.batching} is for generate.engine transformers, and it is {engine}. "
            "Remove one of the two."
        )
    if engine == "openai":
        if generate.capture:
            raise InputError("generate.capture: a server gives no activations. Remove it, or use another engine.")
        check_endpoint(generate.endpoint, KEY)
        if cluster.generation is not None:
            raise InputError(
                f"cluster.generation: {cluster.generation} has no effect with generate.engine openai, where the server "
                "holds the model. Remove it."
            )
    elif generate.endpoint.base_url is not None:
        raise InputError(
            f"{KEY}.base_url: {generate.endpoint.base_url} is asked by generate.engine openai only, and it is {engine}."
        )
    if engine == "vllm":
        if cluster.generation == "offload":
            raise InputError(
                "cluster.generation: offload, which vLLM does not do. Use `whole`, or `tensor` over more GPUs, or "
                "generate.engine transformers."
            )
        if generate.capture and cluster.vllm.eager is False:
            raise InputError("cluster.vllm.eager: false, and generate.capture reads vLLM's model in eager mode only.")
        _check_python(cluster)


def check_hooks(
    hooks: Sequence[LayerHook], layers: int, generate: GenerateConfig, auditor: AuditorConfig, cluster: ClusterConfig
) -> None:
    """Raise InputError for changes to the residual stream of a model of ``layers`` that can't be made so."""
    for hook in hooks:
        if hook.layer >= layers:
            raise InputError(f"steer.layers: {hook.layer}; the model has the layers 0 to {layers - 1}.")
    if not hooks or generate.responses is not None:
        return
    if generate.engine == "openai":
        raise InputError("steer.source: a server's model can't be changed from here. Use another generate.engine.")
    if generate.engine == "vllm" and cluster.vllm.eager is False:
        raise InputError("cluster.vllm.eager: false, and steer.source changes vLLM's model in eager mode only.")
    if auditor.played_by == "model":
        raise InputError(
            "personas.auditor.played_by: model, and with steer.source the user would be changed, too. Use `script`, or "
            "`endpoint` with the model as it is."
        )
    if generate.batching == "continuous" and any(hook.positions == "response" for hook in hooks):
        raise InputError(
            "steer.positions: response, and with continuous batching prompts and responses pass together. Use "
            "generate.batching static, or steer.positions all."
        )


def _check_python(cluster: ClusterConfig) -> None:
    python = cluster.vllm.python
    if python is None:
        check_vllm()
    elif not Path(python).expanduser().is_absolute():
        raise InputError(f"cluster.vllm.python: {python} is relative; give the path that it has on every node.")
    elif ray_address(cluster) is None and not Path(python).expanduser().is_file():
        raise InputError(f"cluster.vllm.python: {python} does not exist. Build the environment (`make vllm`).")


def choose_crew(generate: GenerateConfig, cluster: ClusterConfig, nodes: Sequence[Node]) -> Crew:
    """Replicas for the engine on these nodes. Raises InputError where they can't be had."""
    if generate.engine == "openai":
        # It only waits for answers. One of them asks for as much as the server takes.
        cpus = min(1.0, max((node.cpus for node in nodes), default=1.0) or 1.0)
        workers = Workers(device="cpu", cpus=cpus, gpus=0)
        endpoint = generate.endpoint
        waves = math.ceil(generate.batch_rows / endpoint.concurrency)
        return Crew(
            actors=1,
            workers=workers,
            ranks=1,
            sharding="whole",
            name=f"asking {endpoint.base_url}",
            replicas=1,
            stall_timeout=waves * (endpoint.retries + 1) * (endpoint.timeout + LONGEST_PAUSE),
        )
    sharding = generation_sharding(cluster)
    if generate.engine == "vllm" and sharding == "offload":
        sharding = "whole"  # So much for extraction; check_engine has refused it for generation.
    ranks = gang_size(cluster, nodes) if sharding == "tensor" else 1
    each = share_cluster(cluster, nodes, ranks)
    if generate.engine == "transformers":
        return Crew(actors=ranks, workers=each, ranks=ranks, sharding=sharding, name=sharding)
    # vLLM starts its ranks itself, below one actor that has the devices of all.
    python = cluster.vllm.python
    return Crew(
        actors=1,
        workers=replace(each, cpus=ranks * each.cpus, gpus=ranks * each.gpus),
        ranks=ranks,
        sharding=sharding,
        name=f"tensor, {ranks} ranks" if ranks > 1 else sharding,
        options={} if python is None else {"runtime_env": {"py_executable": str(Path(python).expanduser())}},
    )


def load_engine(spec: GeneratorSpec, chat: ChatFormat, join: Callable[..., Gang]) -> Engine:
    """In an actor: load its model, or its share of one, or find the server. ``join`` joins its gang."""
    checkpoint, dtype = spec.checkpoint, spec.model.settled_dtype
    match spec.config.engine:
        case "openai":
            stops = checkpoint_stop_ids(checkpoint, chat)
            return OpenAIEngine(Endpoint(spec.config.endpoint, KEY), chat, stops, source=spec.model.id)
        case "vllm":
            return VllmEngine(
                checkpoint,
                chat,
                spec.vllm,
                dtype=dtype,
                device=spec.device,
                ranks=spec.ranks,
                threads=max(1, spec.threads // spec.ranks),
                opened=spec.capture is not None or bool(spec.hooks),
            )
    agree = None
    if spec.sharding == "tensor":
        gang = join(rank=spec.rank, ranks=spec.ranks, device=spec.device)
        model, agree = load_causal_lm_parallel(checkpoint, gang, dtype=dtype), gang.agree
    elif spec.offload is not None:
        model = load_causal_lm_offloaded(checkpoint, spec.offload, dtype=dtype, device=spec.device)
    else:
        model = load_causal_lm(checkpoint, dtype=dtype, device=spec.device)
    return TransformersEngine(model, chat, device=spec.device, agree=agree)
