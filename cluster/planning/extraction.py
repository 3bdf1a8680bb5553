"""The extract step before it runs: how the layers are spread over devices, how long it takes. Pure functions.

- Pipeline: with c seconds of the slowest stage for a micro-batch, C of all S stages, t for each hand-over and m
  micro-batches in flight, a replica takes C + (S - 1) t for the first one and max(c, (C + (S - 1) t) / m) for each
  further one. The bubble is the share of the stages' time in which they don't compute.
- Tensor gang: computing is divided by its size; two all-reduces of the states for each layer come on top.
- Offload: each micro-batch takes as long as the slower of computing and fetching all weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from personaspace.cluster.config import Sharding
from personaspace.cluster.planning.costs import (
    ALL_REDUCE,
    DISK,
    ENCODING,
    HANDOVER,
    START_SECONDS,
    Asked,
    devices_each,
    fetching,
    first_layers,
    forward_flop,
    micro_batch_load,
    offload_workers,
    workers_per_node,
)
from personaspace.cluster.planning.fitting import (
    MemoryNeed,
    divided,
    fit_stages,
    gang_sizes,
    layer_boundaries,
    layer_groups,
    stage_needs,
)
from personaspace.cluster.planning.machines import Machines, Rates
from personaspace.cluster.planning.workload import Workload
from personaspace.cluster.schedule import UNCOMMITTED_WINDOWS
from personaspace.extract.config import Dtype
from personaspace.extract.shape import BYTES_OF, ModelShape

INDIFFERENT = 0.05
"""Of layouts whose time differs by less than this share, the one with fewest stages is planned: less to hand over, and
less is lost with a worker."""
WINDOWS_HELD = UNCOMMITTED_WINDOWS + 1
"""Windows of which a stage holds sums at once: those that wait for their writers, and one that is running."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage of a replica, or one rank of a gang."""

    first: int
    stop: int
    """Layers ``[first, stop)``."""
    need: MemoryNeed
    """On its device."""
    host_bytes: int
    """Sums of the windows that it holds, on the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionPlan:
    """How activations will be extracted."""

    sharding: Sharding
    replicas: int
    stages: tuple[StagePlan, ...]
    """Of one replica; ranks of a gang hold all layers, a part of each."""
    devices_each: float
    """Devices of one stage: 1 GPU, or CPU cores."""
    in_flight: int
    """Micro-batches on their way through a replica at once."""
    memory_bytes: int
    """Of the devices of one stage."""
    flop: float
    """Of all forward passes, padding included."""
    seconds: float
    """Start and writing included."""
    bubble: float
    """Share of the stages' time that they wait: filling, draining, hand-over, unlike stages."""
    host_bytes: int
    """Sums on the busiest node."""
    writing_seconds: float
    """That the busiest writer takes; it runs beside the forward passes."""

    @property
    def fits(self) -> bool:
        return all(stage.need.fits(self.memory_bytes) for stage in self.stages)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """All that a plan of a step is made from."""

    shape: ModelShape
    dtype: Dtype
    work: Workload
    machines: Machines
    rates: Rates
    asked: Asked
    fused_attention: bool
    """Attention never holds its scores."""


def plan_extraction(setting: Setting) -> ExtractionPlan:
    """Spread the layers, and estimate the step. Where no pipeline fits the machines, the plan is to offload."""
    setting = replace(setting, shape=first_layers(setting.shape, setting.work.run_layers))
    asked, machines = setting.asked, setting.machines
    if asked.sharding == "tensor":
        return _plan_gang(setting)
    if asked.sharding == "offload":
        return _plan_offload(setting)
    if asked.stages is not None:
        return _plan_pipeline(setting, asked.stages)
    if machines.device.kind == "cpu":
        # Cores of a node share its memory, so that more stages make no room.
        whole = _plan_pipeline(setting, 1)
        return whole if whole.fits else _plan_offload(setting)
    fewest = fewest_stages(setting)
    if fewest is None or not machines.groups(fewest):
        return _plan_offload(setting)
    # Across nodes only where a node is not enough, and no more than the replicas asked for leave.
    room = max(node.devices for node in machines.nodes)
    room = room if fewest <= room else machines.devices
    room = max(fewest, min(room, machines.devices // (asked.replicas or 1)))
    most = min(layer_groups(setting.shape, setting.work.layout.layer_group), room)
    plans = [_plan_pipeline(setting, count) for count in range(fewest, most + 1)]
    fastest = min(plan.seconds for plan in plans)
    return next(plan for plan in plans if plan.seconds <= fastest * (1 + INDIFFERENT))


def fewest_stages(setting: Setting) -> int | None:
    """Stages that the layers need on these devices; None where one layer group alone is too much."""
    shape = first_layers(setting.shape, setting.work.run_layers)
    load = micro_batch_load(setting.work, setting.fused_attention)
    device = setting.machines.device
    return fit_stages(shape, setting.dtype, load, device.memory_bytes, setting.work.layout.layer_group, device.kind)


def fit_gang(shape: ModelShape, machines: Machines, need_of: Callable[[int], MemoryNeed]) -> int | None:
    """Fewest devices of one node that hold a model between them, where each takes ``need_of(size)``."""
    most = max(node.devices for node in machines.nodes)
    return next((size for size in gang_sizes(shape, most) if need_of(size).fits(machines.device.memory_bytes)), None)


def _plan_pipeline(setting: Setting, count: int) -> ExtractionPlan:
    shape, work, machines, asked = setting.shape, setting.work, setting.machines, setting.asked
    most = len(machines.nodes) if machines.device.kind == "cpu" else machines.groups(count)
    replicas = min(asked.replicas or max(1, most), work.windows)
    each = devices_each(machines, replicas * count)
    cuts = layer_boundaries(shape, work.layout.layer_group, count)
    load = micro_batch_load(work, setting.fused_attention)
    needs = stage_needs(shape, setting.dtype, work.layout.layer_group, count, load, machines.device.kind)
    stages = tuple(
        StagePlan(first=first, stop=stop, need=need, host_bytes=_window_bytes(shape, work, stop - first))
        for (first, stop), need in zip(pairwise(cuts), needs, strict=True)
    )
    seconds = [
        work.micro_batch_tokens
        * forward_flop(shape, stage.first, stage.stop, work.rollout_tokens)
        / (setting.rates.forward_flops * each)
        for stage in stages
    ]
    in_flight = asked.in_flight or 2 * count
    transfer = work.micro_batch_tokens * shape.hidden * BYTES_OF[setting.dtype] / HANDOVER
    first_through = sum(seconds) + (count - 1) * transfer
    further = max(max(seconds), first_through / in_flight)
    batches = _batches_of_a_replica(work, replicas)
    running = first_through + (batches - 1) * further
    return _finish(
        setting,
        "pipeline",
        replicas,
        stages,
        each,
        in_flight=in_flight,
        running=running,
        bubble=1 - batches * (sum(seconds) / count) / running,
        loading=_whole_need(setting).weights,
    )


def _plan_gang(setting: Setting) -> ExtractionPlan:
    shape, work, machines = setting.shape, setting.work, setting.machines
    whole = _whole_need(setting)
    fitting = fit_gang(shape, machines, lambda size: divided(whole, size))
    size = setting.asked.stages or fitting or max(node.devices for node in machines.nodes)
    replicas = min(setting.asked.replicas or max(1, machines.groups(size)), work.windows)
    each = devices_each(machines, replicas * size)
    sent = 2 * shape.layers * work.micro_batch_tokens * shape.hidden * BYTES_OF[setting.dtype]
    seconds = _micro_batch_flop(setting) / (setting.rates.forward_flops * each * size)
    seconds += 2 * sent * (size - 1) / size / ALL_REDUCE
    rank = StagePlan(
        first=0,
        stop=shape.layers,
        need=divided(whole, size),
        host_bytes=_window_bytes(shape, work, shape.layers) // size,
    )
    running = _batches_of_a_replica(work, replicas) * seconds
    return _finish(
        setting, "tensor", replicas, (rank,) * size, each, in_flight=1, running=running, loading=whole.weights
    )


def _plan_offload(setting: Setting) -> ExtractionPlan:
    """One whole model per worker; as many workers as is fastest, since they share the host's memory and disk."""
    shape, work, machines = setting.shape, setting.work, setting.machines
    whole = _whole_need(setting)
    # Two blocks are on the device at a time, one of them arriving, and the embedding.
    block = max(shape.block_bytes(layer, setting.dtype) for layer in range(shape.layers))
    need = replace(whole, weights=2 * block + shape.slice_bytes(0, 0, setting.dtype))
    stage = StagePlan(first=0, stop=shape.layers, need=need, host_bytes=_window_bytes(shape, work, shape.layers))
    plans = []
    for replicas in offload_workers(machines, setting.asked.replicas, work.windows):
        each = devices_each(machines, replicas)
        seconds = max(
            _micro_batch_flop(setting) / (setting.rates.forward_flops * each),
            whole.weights / fetching(whole.weights, replicas, machines),
        )
        running = _batches_of_a_replica(work, replicas) * seconds
        plans.append(
            _finish(setting, "offload", replicas, (stage,), each, in_flight=1, running=running, loading=whole.weights)
        )
    return min(plans, key=lambda plan: plan.seconds)


def _finish(
    setting: Setting,
    sharding: Sharding,
    replicas: int,
    stages: tuple[StagePlan, ...],
    each: float,
    *,
    in_flight: int,
    running: float,
    loading: int,
    bubble: float = 0.0,
) -> ExtractionPlan:
    work, machines = setting.work, setting.machines
    largest = max(stage.stop - stage.first for stage in stages)
    share = largest / work.run_layers / (len(stages) if sharding == "tensor" else 1)
    writing = work.stored_values * 4 * share / replicas / ENCODING
    tokens = work.tokens / (1 - work.padding)
    return ExtractionPlan(
        sharding=sharding,
        replicas=replicas,
        stages=stages,
        devices_each=each,
        in_flight=in_flight,
        memory_bytes=int(machines.device.memory_bytes * each),
        flop=tokens * forward_flop(setting.shape, 0, setting.shape.layers, work.rollout_tokens),
        seconds=max(running, writing) + START_SECONDS + loading / DISK,
        bubble=bubble,
        host_bytes=sum(stage.host_bytes for stage in stages) * workers_per_node(replicas, machines),
        writing_seconds=writing,
    )


def _whole_need(setting: Setting) -> MemoryNeed:
    """What the model takes on one device."""
    shape = setting.shape
    load = micro_batch_load(setting.work, setting.fused_attention)
    return stage_needs(shape, setting.dtype, shape.layers, 1, load, setting.machines.device.kind)[0]


def _micro_batch_flop(setting: Setting) -> float:
    shape, work = setting.shape, setting.work
    return work.micro_batch_tokens * forward_flop(shape, 0, shape.layers, work.rollout_tokens)


def _batches_of_a_replica(work: Workload, replicas: int) -> float:
    """Micro-batches of the replica that has most: whole windows are dealt out."""
    windows = math.ceil(work.windows / replicas)
    total = work.tokens / (1 - work.padding) / work.micro_batch_tokens
    return max(1.0, min(total, windows * work.window_batches))


def _window_bytes(shape: ModelShape, work: Workload, layers: int) -> int:
    """Sums on the host: float32 of each rollout, layer, site and segment of the windows at hand."""
    held = min(work.rollouts, WINDOWS_HELD * work.window_rows)
    return held * layers * shape.hidden * 4 * work.sites * work.segments
