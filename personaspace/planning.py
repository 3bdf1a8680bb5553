"""From a config and flags to a plan: finds shape, personas, machines and rates."""

import argparse
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.job import plan_rollouts
from personaspace.cluster.planning.costs import Asked, forward_flop
from personaspace.cluster.planning.described import Description, described_machines, live_machines, this_machine
from personaspace.cluster.planning.machines import Machines, Rates, gpu_rates
from personaspace.cluster.planning.plan import RunPlan, plan_run
from personaspace.cluster.precision import choose_dtype
from personaspace.cluster.session import ray_address, ray_cluster
from personaspace.config import RunConfig
from personaspace.extract.calibrate import calibrate
from personaspace.extract.config import ModelConfig
from personaspace.extract.counting import count_shape, read_config
from personaspace.extract.shape import ModelShape, shipped_config, shipped_shape, shipped_shapes
from personaspace.store.errors import InputError


def plan_config(config: RunConfig, flags: argparse.Namespace) -> RunPlan:
    """Plan the run that ``config`` describes on the machines that ``flags`` describe, or that are there."""
    transformers_logging.set_verbosity_error()
    shape = find_shape(config.model)
    with ExitStack() as stack:
        machines = find_machines(_described(flags), config.cluster, ray_address(config.cluster), stack)
        if config.cluster.device == "cpu" and machines.device.kind == "cuda":
            raise InputError("cluster.device: cpu, but the machines to plan for have GPUs; leave one of the two out.")
        config = settled(config, machines)
    asked = asked_of(config.cluster)
    options = {"prompt_tokens": flags.prompt_tokens, "response_tokens": flags.response_tokens}
    if machines.device.kind == "cpu" and not machines.device.flops:
        rough = make_plan(config, shape, machines, rough_rates(machines, shape), asked, **options)
        return make_plan(config, shape, machines, measure_rates(config.model, rough), asked, **options)
    rates = gpu_rates(
        machines.device, peak_share=flags.peak_share, bandwidth_share=flags.bandwidth_share, layers=shape.layers
    )
    if machines.device.kind == "cpu":
        rates = replace(rates, step_seconds=0.0, decode_bandwidth=rates.decode_bandwidth or float("inf"))
    return make_plan(config, shape, machines, rates, asked, **options)


def sketch_plan(config: RunConfig, shape: ModelShape, flags: argparse.Namespace) -> RunPlan:
    """The layout for ``config`` on the machines that ``flags`` describe, or that are there; its hours mean nothing."""
    with ExitStack() as stack:
        machines = find_machines(_described(flags), config.cluster, ray_address(config.cluster), stack)
        config = settled(config, machines)
    return make_plan(config, shape, machines, rough_rates(machines, shape), Asked())


def settled(config: RunConfig, machines: Machines) -> RunConfig:
    """``config`` with what `model.dtype: auto` stands for on ``machines``, in a run that is begun there."""
    if config.model.dtype != "auto":
        return config
    dtype, _ = choose_dtype(machines.device.kind, config.cluster)
    return replace(config, model=replace(config.model, dtype=dtype))


def rough_rates(machines: Machines, shape: ModelShape) -> Rates:
    """Rates that are good enough to compare layouts on the same machines."""
    device = machines.device
    device = replace(device, flops=device.flops or 1e12, bandwidth=device.bandwidth or 1e11)
    return gpu_rates(device, peak_share=1.0, bandwidth_share=1.0, layers=shape.layers)


def _described(flags: argparse.Namespace) -> Description:
    return Description(**{field.name: getattr(flags, field.name) for field in fields(Description)})


def make_plan(
    config: RunConfig, shape: ModelShape, machines: Machines, rates: Rates, asked: Asked, **options: float | None
) -> RunPlan:
    """The plan of ``config`` with everything found."""
    personas = plan_rollouts(config.personas, config.generate, shape.name)
    return plan_run(
        shape,
        personas,
        model=config.model,
        generate=config.generate,
        extract=config.extract,
        store=config.store,
        machines=machines,
        rates=rates,
        asked=asked,
        **options,
    )


def find_shape(model: ModelConfig) -> ModelShape:
    """The model's shape: shipped with the package, else from its config. Raises InputError where neither is there."""
    shipped = None if Path(model.id).expanduser().is_dir() else shipped_shape(model.id)
    if shipped is not None:
        return shipped
    name = Path(model.id).expanduser().name
    try:
        config = read_config(model)
    except InputError as error:
        known = sorted({name for document in shipped_shapes().values() for name in document["ids"]})
        raise InputError(f"{error} No download is needed for {', '.join(known)}.") from error
    return count_shape(config, name, trust_remote_code=model.trust_remote_code)


def asked_of(cluster: ClusterConfig) -> Asked:
    """What the config says of the cluster; what it leaves open, the plan chooses."""
    return Asked(
        stages=cluster.stages, replicas=cluster.replicas, in_flight=cluster.in_flight, sharding=cluster.sharding
    )


def find_machines(description: Description, cluster: ClusterConfig, address: str | None, stack: ExitStack) -> Machines:
    """Those that flags describe, else the live cluster's, else this one."""
    if description.names_machines:
        return described_machines(description)
    if address is not None:
        stack.enter_context(ray_cluster(cluster))
        return live_machines(description)
    return this_machine(description)


def measure_rates(model: ModelConfig, plan: RunPlan) -> Rates:
    """What a core of this machine does with the model: a few seconds of its own blocks, with random weights."""
    work = plan.work
    tokens = round(work.rollout_tokens)
    rows = max(1, round(work.micro_batch_tokens / tokens))
    found = calibrate(
        _transformers_config(model),
        work.run_layers,
        model.settled_dtype,
        micro_batch=(rows, tokens),
        decode_rows=work.batch_rows,
        context=round(work.prompt_tokens + work.max_new_tokens / 2),
    )
    flop = rows * tokens * forward_flop(plan.shape, 0, work.run_layers, tokens)
    return Rates(
        forward_flops=flop / found.forward_seconds,
        decode_flops=float("inf"),
        decode_bandwidth=float("inf"),
        step_seconds=0.0,
        step_device_seconds=found.step_seconds,
        source=f"a core measured here: {flop / found.forward_seconds / 1e9:.0f} GFLOP/s, "
        f"{found.step_seconds * 1e3:.0f} ms a step",
    )


def _transformers_config(model: ModelConfig) -> Any:
    shipped = None if Path(model.id).expanduser().is_dir() else shipped_config(model.id)
    if shipped is None:
        return read_config(model)
    return AutoConfig.for_model(**shipped)
