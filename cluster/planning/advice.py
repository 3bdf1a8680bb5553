"""What a plan warns of: what does not fit, and the nearest way out. Pure functions."""

import math
from collections.abc import Iterator
from dataclasses import replace

from personaspace.cluster.planning.costs import HOST_SHARE, first_layers, micro_batch_load
from personaspace.cluster.planning.extraction import ExtractionPlan, Setting, fewest_stages, plan_extraction
from personaspace.cluster.planning.fitting import fit_stages, layer_groups
from personaspace.cluster.planning.generation import GenerationPlan
from personaspace.cluster.planning.machines import GiB

LARGEST_BUBBLE = 0.05
"""Share of the stages' time that may be waiting before it is worth a word."""


def advise(setting: Setting, generation: GenerationPlan | None, extraction: ExtractionPlan | None) -> Iterator[str]:
    """Sentences for people, each with the value and what to do."""
    if extraction is not None:
        yield from _extraction_fits(setting, extraction)
    if generation is not None:
        yield from _generation_fits(setting, generation)
    if extraction is not None:
        yield from _host_memory(setting, extraction)
        if extraction.sharding != "offload":
            yield from _use(setting, extraction)
    yield from _lengths(setting)


def _extraction_fits(setting: Setting, plan: ExtractionPlan) -> Iterator[str]:
    asked, machines, work = setting.asked, setting.machines, setting.work
    groups = layer_groups(first_layers(setting.shape, work.run_layers), work.layout.layer_group)
    if asked.stages is not None and asked.stages > groups and asked.sharding == "pipeline":
        yield (
            f"cluster.stages: {asked.stages}, but the layers lie in {groups} groups of {work.layout.layer_group}; "
            f"planned with {groups}. More stages need a smaller store.layer_group, in a new run."
        )
    if plan.sharding == "offload":
        if asked.sharding == "pipeline":
            yield _too_large(setting)
        return
    if not plan.fits:
        need = max(stage.need.total for stage in plan.stages)
        free = replace(setting, asked=replace(asked, stages=None, replicas=None, sharding="pipeline"))
        nearest = plan_extraction(free)
        way_out = (
            f"the nearest layout that fits is {nearest.replicas} x {len(nearest.stages)} stages"
            if nearest.sharding == "pipeline"
            else "no number of stages fits these machines; see cluster.sharding: offload, or more nodes"
        )
        yield (
            f"{len(plan.stages)} {'stages take' if len(plan.stages) > 1 else 'stage takes'} {need / GiB:.1f} GiB of a "
            f"device with {plan.memory_bytes / GiB:.1f} GiB; {way_out}."
        )
    size = len(plan.stages)
    wanted = plan.replicas * size
    if machines.device.kind == "cuda" and wanted > machines.devices:
        yield (
            f"{plan.replicas} x {size} stages need {wanted} GPUs, and there are {machines.devices}. Lower "
            "cluster.stages or cluster.replicas."
        )
    elif machines.device.kind == "cuda" and machines.spans_nodes(size):
        yield f"A replica of {size} stages spans nodes: its hidden states cross the network."


def _too_large(setting: Setting) -> str:
    machines, work = setting.machines, setting.work
    fewest = fewest_stages(setting)
    load = micro_batch_load(work, setting.fused_attention)
    shape = first_layers(setting.shape, work.run_layers)
    what = f"{setting.shape.name} does not fit"
    if fewest is not None:
        per_node = max(node.devices for node in machines.nodes)
        return (
            f"{what}, not even on all {machines.devices} devices: it needs {fewest} stages. Use "
            f"{math.ceil(fewest / per_node)} nodes, or cluster.sharding: offload, which is what is planned here."
        )
    device = machines.device
    finer = next(
        (
            (group, stages)
            for group in range(work.layout.layer_group - 1, 0, -1)
            if (stages := fit_stages(shape, setting.dtype, load, device.memory_bytes, group, device.kind)) is not None
        ),
        None,
    )
    if finer is not None:
        group, stages = finer
        return (
            f"{what}: one group of {work.layout.layer_group} layers is too large for a device of "
            f"{device.memory_bytes / GiB:.1f} GiB. With store.layer_group: {group} it needs {stages} stages; or use "
            "cluster.sharding: offload, which is what is planned here."
        )
    return (
        f"{what}: even a single layer with a micro-batch of {load.tokens} tokens is too large for a device of "
        f"{device.memory_bytes / GiB:.1f} GiB. Lower extract.micro_batch_tokens, or use devices with more memory."
    )


def _generation_fits(setting: Setting, plan: GenerationPlan) -> Iterator[str]:
    where = f"{plan.memory_bytes / GiB:.1f} GiB"
    need = f"{plan.need.total / GiB:.1f} GiB with {setting.work.batch_rows} rollouts at once"
    if plan.offload:
        yield (
            f"Generating takes {need}, and neither a device of {where} nor a gang of one node holds that: weights "
            "would be fetched at each step. Lower generate.batch_rows, use devices with more memory, or import "
            "responses."
        )
    elif plan.devices_each > 1 and setting.machines.device.kind == "cuda":
        yield (
            f"The whole model does not fit one device while generating: {plan.generators} tensor gang(s) of "
            f"{plan.devices_each:.0f} GPUs are planned."
        )


def _host_memory(setting: Setting, plan: ExtractionPlan) -> Iterator[str]:
    memory = min(node.memory_bytes for node in setting.machines.nodes)
    if plan.host_bytes > HOST_SHARE * memory:
        rows = setting.work.window_rows * HOST_SHARE * memory / plan.host_bytes
        unit = setting.work.layout.unit_rows
        fewer = max(unit, int(rows) // unit * unit)
        yield (
            f"Sums of uncommitted windows take {plan.host_bytes / GiB:.0f} GiB of a node's {memory / GiB:.0f} GiB. Set "
            f"extract.window_rows: {fewer}."
        )


def _use(setting: Setting, plan: ExtractionPlan) -> Iterator[str]:
    used = plan.replicas * len(plan.stages) * plan.devices_each
    devices = setting.machines.devices
    if used <= devices * 0.75 and plan.replicas == setting.work.windows:
        unit = setting.work.layout.unit_rows
        rows = max(unit, setting.work.rollouts // max(1, devices // len(plan.stages)) // unit * unit)
        yield (
            f"Only {setting.work.windows} windows of {setting.work.window_rows} rollouts: {used:.0f} of {devices} "
            f"devices are used in extraction. Set extract.window_rows: {rows} for more."
        )
    elif used < devices and setting.machines.device.kind == "cuda":
        yield f"{devices - used:.0f} of {devices} GPUs are idle in extraction."
    if plan.bubble > LARGEST_BUBBLE:
        yield (
            f"Stages wait {plan.bubble:.0%} of the time. Fewer stages, or cluster.in_flight above {plan.in_flight}, "
            "keep them busier."
        )
    if plan.writing_seconds > plan.seconds * 0.95:
        yield f"Writing takes longer than computing: {plan.writing_seconds / 3600:.1f} h for the busiest stage."


def _lengths(setting: Setting) -> Iterator[str]:
    work, most = setting.work, setting.shape.max_positions
    if most is not None and work.prompt_tokens + work.max_new_tokens > most:
        yield (
            f"Rollouts of {work.prompt_tokens:.0f} + {work.max_new_tokens} tokens are longer than the model's {most} "
            "positions, and would be dropped. Lower generate.max_new_tokens."
        )
