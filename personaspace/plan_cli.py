"""`personaspace plan`: what a run would take, as a table for people and as JSON; nothing is written or downloaded."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from personaspace.cluster.planning.extraction import ExtractionPlan
from personaspace.cluster.planning.generation import GenerationPlan
from personaspace.cluster.planning.machines import GiB
from personaspace.cluster.planning.plan import RunPlan
from personaspace.config import load_config
from personaspace.store.catalog import human_bytes

PLAIN_WIDTH = 120
"""Columns of the table where there is no terminal."""


def add_plan_command(commands: Any) -> None:
    """Add `plan` and its flags to the command line."""
    plan = commands.add_parser(
        "plan",
        help="what a run would take: layout, memory, hours, money, bytes",
        description="What a run would take. The machines are those of the flags, else those of the Ray cluster "
        "(RAY_ADDRESS or cluster.address), else this one.",
        epilog="All settings of the config are flags here, too: --extract.micro-batch-tokens 16384",
        allow_abbrev=False,
    )
    plan.add_argument("target", metavar="CONFIG", help="YAML file")
    add_machine_flags(plan)
    plan.add_argument("--peak-share", type=_share, default=0.45, metavar="X", help="of --flops reached (default 0.45)")
    plan.add_argument(
        "--bandwidth-share", type=_share, default=0.6, metavar="X", help="of --bandwidth reached (default 0.6)"
    )
    plan.add_argument("--response-tokens", type=_above_zero, metavar="N", help="mean length (default: estimated)")
    plan.add_argument("--prompt-tokens", type=_above_zero, metavar="N", help="mean length (default: estimated)")
    plan.add_argument("--price", type=_above_zero, metavar="X", help="of one GPU (or CPU core) for an hour")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON, too")


def add_machine_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags that describe machines."""
    command.add_argument("--nodes", type=int, metavar="N", help="plan for N nodes (default 1)")
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="with N GPUs each (default 8)")
    command.add_argument("--gpu", metavar="NAME", help="such as H100 (the default), H200, A100, B200, L40S")
    command.add_argument("--gpu-memory", metavar="BYTES", help="of one GPU, such as 80GiB (default: the GPU's own)")
    command.add_argument("--host-memory", metavar="BYTES", help="of one node, such as 1TiB (default 1000GiB)")
    command.add_argument(
        "--flops", type=float, metavar="X", help="FLOP per second of one device at best, such as 989e12"
    )
    command.add_argument("--bandwidth", type=float, metavar="X", help="bytes per second of its memory, such as 3.35e12")


def run_plan(parsed: argparse.Namespace, flags: Sequence[str]) -> None:
    """Print the plan. Raises InputError for bad flags, configs, and models that are not found."""
    config = load_config(Path(parsed.target), flags, prog="personaspace plan CONFIG")
    # Heavy libraries load here, so that --help and bad config files answer at once.
    from personaspace.planning import plan_config

    plan = plan_config(config, parsed)
    show_plan(plan, parsed.price)
    if parsed.json is not None:
        document = {**asdict(plan), "flop": plan.flop, "hours": plan.hours, "device_hours": plan.device_hours}
        parsed.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


def show_plan(plan: RunPlan, price: float | None, console: Console | None = None) -> None:
    """Print the plan as a table; plain text where the output is no terminal."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH, file=console.file)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _rows(plan, price):
        table.add_row(name, text)
    console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def _rows(plan: RunPlan, price: float | None) -> Iterator[tuple[str, str]]:
    shape, work = plan.shape, plan.work
    yield (
        "model",
        (
            f"{shape.name}: {shape.parameters / 1e9:.2f} billion parameters, {shape.layers} layers x {shape.hidden}, "
            f"{plan.dtype}, {shape.whole_bytes(plan.dtype) / GiB:.1f} GiB"
        ),
    )
    yield "machines", f"{plan.machines.describe()}; {plan.rates.source}"
    yield (
        "work",
        (
            f"{work.rollouts:,} rollouts of {work.roles} roles, {work.prompt_tokens:.0f} + {work.response_tokens:.0f} "
            f"tokens each (estimated): {work.tokens / 1e6:,.1f} million tokens"
        ),
    )
    if plan.generation is not None:
        yield from _generation_rows(plan.generation, work.batch_rows)
    if plan.extraction is None:
        yield "extract", "nothing: activations are captured while generating"
    else:
        yield from _extraction_rows(plan.extraction)
    yield (
        "store",
        (
            f"{human_bytes(work.store_bytes)}: {work.stored_values / 1e9:,.2f} billion values in {work.shards:,} "
            f"shards, {work.objects:,} objects"
        ),
    )
    extracting = "" if plan.extraction is None else f", of them {plan.extraction.flop:.2e} for extraction"
    yield "FLOP", f"{plan.flop:.2e}{extracting}"
    yield "in all", _total(plan, price)


def _generation_rows(plan: GenerationPlan, rows: int) -> Iterator[tuple[str, str]]:
    way = "offloaded" if plan.offload else f"on {plan.devices_each:g} device(s) each"
    yield (
        "generate",
        (
            f"{_duration(plan.seconds)}: {plan.generators} generator(s) {way}, {rows} rollouts at once, "
            f"{plan.step_seconds * 1e3:.1f} ms a step ({plan.bound})"
        ),
    )
    yield "", f"memory of each: {_memory(plan.need.total, plan.memory_bytes)}"


def _extraction_rows(plan: ExtractionPlan) -> Iterator[tuple[str, str]]:
    cuts = ", ".join(dict.fromkeys(f"{stage.first} to {stage.stop - 1}" for stage in plan.stages))
    ways = {
        "pipeline": f"{plan.replicas} replica(s) x {len(plan.stages)} stage(s) of {plan.devices_each:g} device(s)",
        "tensor": f"{plan.replicas} tensor gang(s) of {len(plan.stages)} devices",
        "offload": f"{plan.replicas} worker(s) that fetch the weights (cluster.sharding: offload)",
    }
    yield "extract", f"{_duration(plan.seconds)}: {ways[plan.sharding]}, {plan.in_flight} micro-batches in flight"
    yield "", f"layers {cuts}; bubble {plan.bubble:.1%}; {_duration(plan.writing_seconds)} of writing beside it"
    stage = max(plan.stages, key=lambda stage: stage.need.total)
    need = stage.need
    yield (
        "",
        (
            f"memory of the fullest: {_memory(need.total, plan.memory_bytes)}: weights {need.weights / GiB:.1f}, "
            f"activations {need.activations / GiB:.1f}, sums {need.pooled / GiB:.2f}, "
            f"workspace {need.workspace / GiB:.1f}"
        ),
    )
    yield "", f"host memory: {human_bytes(stage.host_bytes)} of sums per stage, {human_bytes(plan.host_bytes)} per node"


def _memory(need: int, memory: int) -> str:
    return f"{need / GiB:.1f} of {memory / GiB:.1f} GiB ({1 - need / memory:.0%} head-room)"


def _total(plan: RunPlan, price: float | None) -> str:
    what = "GPU-hours" if plan.machines.device.kind == "cuda" else "core-hours"
    cost = "" if price is None else f", {plan.device_hours * price:,.2f} at {price:g} each"
    return f"{_duration(plan.hours * 3600)}, {plan.device_hours:,.2f} {what}{cost}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.2f} h"


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give a number above 0 and up to 1")
    return value


def _above_zero(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
