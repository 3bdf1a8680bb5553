"""The generate step before it runs: how many models decode side by side, how long it takes. Pure functions.

A decoding step of B rows reads the weights once and the rows' caches, and takes 2 (P + head) B FLOP: as long as
the slower of the two (the roofline model, Williams et al. 2009), plus what the host needs to launch it. Batches are
static, so each takes `max_new_tokens` steps: one of its rows will not stop before.
"""

import math
from dataclasses import dataclass

from personaspace.cluster.planning.costs import (
    DISK,
    START_SECONDS,
    devices_each,
    fetching,
    forward_flop,
    offload_workers,
)
from personaspace.cluster.planning.extraction import Setting, fit_gang
from personaspace.cluster.planning.fitting import MemoryNeed, generator_need


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationPlan:
    """How responses will be sampled."""

    generators: int
    devices_each: float
    """Devices that hold one model: several GPUs are a tensor gang."""
    need: MemoryNeed
    """On each GPU; on CPUs, of the whole generator."""
    memory_bytes: int
    """Of the same."""
    offload: bool
    """The model fits no gang: its weights are fetched at each step."""
    prefill_flop: float
    decode_flop: float
    step_seconds: float
    """Of one decoding step."""
    bound: str
    """What a decoding step waits for."""
    seconds: float
    """Start included."""


def plan_generation(setting: Setting) -> GenerationPlan | None:
    """Divide the devices into generators, and estimate the step. None where responses are imported."""
    shape, dtype, work, machines = setting.shape, setting.dtype, setting.work, setting.machines
    if not work.batches:
        return None

    def need_of(size: int) -> MemoryNeed:
        return generator_need(
            shape,
            dtype,
            size,
            rows=work.batch_rows,
            prompt_tokens=math.ceil(work.prompt_tokens * 1.5),
            new_tokens=work.max_new_tokens,
            kind=machines.device.kind,
        )

    if machines.device.kind == "cpu":
        # Cores work on one model together, without a gang.
        generators = min(setting.asked.replicas or len(machines.nodes), work.batches)
        size, each = 1, devices_each(machines, generators)
        memory = int(machines.device.memory_bytes * each)
        offload = not need_of(1).fits(memory)
    else:
        fitting = fit_gang(shape, machines, need_of)
        size, offload = fitting or 1, fitting is None
        generators = min(setting.asked.replicas or machines.groups(size), work.batches)
        each, memory = float(size), machines.device.memory_bytes
    counts = offload_workers(machines, setting.asked.replicas, work.batches) if offload else [generators]
    plans = []
    for count in counts:
        step, bound = _step(setting, count, each, offload)
        prefill = work.batch_rows * work.prompt_tokens * forward_flop(shape, 0, shape.layers, work.prompt_tokens)
        batch = prefill / (setting.rates.forward_flops * each) + work.max_new_tokens * step
        full = work.rollouts / work.batch_rows
        plans.append(
            GenerationPlan(
                generators=count,
                devices_each=each,
                need=need_of(size),
                memory_bytes=memory,
                offload=offload,
                prefill_flop=prefill * full,
                decode_flop=_step_flop(setting) * work.max_new_tokens * full,
                step_seconds=step,
                bound=bound,
                seconds=math.ceil(work.batches / count) * batch
                + START_SECONDS
                + shape.whole_bytes(dtype) / size / DISK,
            )
        )
    return min(plans, key=lambda plan: plan.seconds)


def _step(setting: Setting, generators: int, each: float, offload: bool) -> tuple[float, str]:
    """Seconds of one decoding step, and what it waits for."""
    shape, rates, work = setting.shape, setting.rates, setting.work
    whole = shape.whole_bytes(setting.dtype)
    cache = work.batch_rows * _context(setting) * shape.kv_bytes(setting.dtype)
    roofs = {
        "memory bandwidth": (whole + cache) / (rates.decode_bandwidth * each),
        "compute": _step_flop(setting) / (rates.decode_flops * each),
    }
    if offload:
        roofs["fetching weights"] = whole / fetching(whole, generators, setting.machines)
    roof = max(roofs, key=lambda name: roofs[name])
    others = {"launches by the host": rates.step_seconds, "as measured": rates.step_device_seconds / each}
    seconds = roofs[roof] + sum(others.values())
    longest = max(others, key=lambda name: others[name])
    return seconds, longest if others[longest] > roofs[roof] else roof


def _step_flop(setting: Setting) -> float:
    """FLOP of one decoding step of a full batch."""
    shape = setting.shape
    attention = 4 * _context(setting) * shape.heads * shape.head_dim * shape.layers
    weights = 2 * sum(shape.active_parameters) + 2 * shape.hidden * shape.vocabulary
    return setting.work.batch_rows * (weights + attention)


def _context(setting: Setting) -> float:
    """Tokens behind a row, on average over the steps."""
    return setting.work.prompt_tokens + setting.work.max_new_tokens / 2
