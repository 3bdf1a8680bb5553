"""What `personaspace plan` predicts for the demo on this machine, and with `--measure` what it takes, side by side.

python benchmarks/plan.py --json FILE                          # the prediction alone: a minute of calibration
python benchmarks/plan.py --json FILE --measure [--quick]      # and the run; --prediction FILE uses an earlier one
"""

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from machine import describe_machine

from personaspace.cluster.events import Event, Progressed, StepFinished, StepStarted
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import plan_rollouts, prepare
from personaspace.cluster.planning.costs import DISK, START_SECONDS, Asked
from personaspace.cluster.planning.described import Description, described_machines, this_machine
from personaspace.cluster.planning.machines import GiB, gpu_rates
from personaspace.cluster.planning.plan import RunPlan, plan_run
from personaspace.cluster.session import hold_run, ray_cluster
from personaspace.config import RunConfig, load_config
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.personas import PersonaPlan
from personaspace.planning import asked_of, find_shape, make_plan, measure_rates, rough_rates, settled
from personaspace.store.catalog import summarize
from personaspace.store.config import StoreConfig

SAMPLE_SECONDS = 0.2
PAPER_MODELS = ("google/gemma-2-27b-it", "Qwen/Qwen3-32B", "meta-llama/Llama-3.3-70B-Instruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--paper", action="store_true", help="print the paper's models on H100s as a table, no more")
    parser.add_argument("--measure", action="store_true", help="run generate and extract, too")
    parser.add_argument("--prediction", type=Path, help="JSON of an earlier call, in place of a new prediction")
    parser.add_argument("--folder", type=Path, help="where the run goes (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="eight questions and six roles")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.paper:
        print_paper_table()
        return
    quick = ["--personas.max-questions", "8", "--personas.only", "ghost", "poet", "teacher", "doctor", "pirate", "void"]
    config = load_config(arguments.config, quick if arguments.quick else [])
    config = settled(config, this_machine(Description()))
    if arguments.prediction is None:
        document: dict[str, Any] = {"machine": describe_machine(Path.cwd()), "predicted": predict(config)}
    else:
        document = json.loads(arguments.prediction.read_text())
    _save(document, arguments.json)  # Before anything is measured.
    if arguments.measure:
        document["measured"] = measure(config, arguments.folder)
        document["measured_over_predicted"] = {
            name: value / document["predicted"][name]
            for name, value in document["measured"].items()
            if document["predicted"].get(name)
        }
        document["load_average_after"] = os.getloadavg()[0]
        _save(document, arguments.json)
    print(json.dumps({name: part for name, part in document.items() if name != "plan"}, indent=1))


def print_paper_table() -> None:
    """The paper's job, 276 roles x 5 prompts x 240 questions, on 1, 2 and 4 nodes of 8 H100."""
    print("| model | nodes | generate | h | extract | h | GiB | bubble | host GB/node | all, h | GPU-h | store GB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in PAPER_MODELS:
        for nodes in (1, 2, 4):
            plan = plan_paper(name, nodes)
            made, run = plan.generation, plan.extraction
            assert made is not None
            assert run is not None
            fullest = max(stage.need.total for stage in run.stages) / GiB
            cells = (
                name.rpartition("/")[2],
                nodes,
                f"{made.generators} x {made.devices_each:.0f} GPU",
                f"{made.seconds / 3600:.2f}",
                f"{run.replicas} x {len(run.stages)} stage{'s' * (len(run.stages) > 1)}",
                f"{run.seconds / 3600:.2f}",
                f"{fullest:.1f} ({1 - fullest * GiB / run.memory_bytes:.0%} free)",
                f"{run.bubble:.2%}",
                f"{run.host_bytes / 1e9:.0f}",
                f"{plan.hours:.2f}",
                f"{plan.device_hours:.1f}",
                f"{plan.work.store_bytes / 1e9:.0f}",
            )
            print(f"| {' | '.join(str(cell) for cell in cells)} |")


def plan_paper(name: str, nodes: int) -> RunPlan:
    """The paper's job with prompts and questions of the lengths of the catalogue that ships."""
    model, generate = ModelConfig(id=name, dtype="bfloat16"), GenerateConfig()
    base = plan_rollouts(PersonasConfig(), generate, name)
    rows = tuple(
        replace(base.rows[(role * 37 + prompt * 240 + question) % len(base.rows)], row=row, role_id=role)
        for row, (role, prompt, question) in enumerate(product(range(276), range(5), range(240)))
    )
    machines = described_machines(Description(nodes=nodes))
    shape = find_shape(model)
    return plan_run(
        shape,
        PersonaPlan(roles=(base.roles * 7)[:276], questions=base.questions * 5, rows=rows),
        model=model,
        generate=generate,
        extract=ExtractConfig(),
        store=StoreConfig(root="/", run="paper"),
        machines=machines,
        rates=gpu_rates(machines.device, peak_share=0.45, bandwidth_share=0.6, layers=shape.layers),
        asked=Asked(),
    )


def predict(config: RunConfig) -> dict[str, Any]:
    """The figures that can be measured, for the layout that the config has."""
    cluster, shape = config.cluster, find_shape(config.model)
    asked = asked_of(cluster)
    machines = this_machine(Description())
    plan = make_plan(config, shape, machines, rough_rates(machines, shape), asked)
    plan = make_plan(config, shape, machines, measure_rates(config.model, plan), asked)
    return {**figures(plan), "rates": asdict(plan.rates), "warnings": plan.warnings}


def figures(plan: RunPlan) -> dict[str, float]:
    assert plan.generation is not None
    assert plan.extraction is not None
    return {
        "generate_seconds": plan.generation.seconds,
        "extract_seconds": plan.extraction.seconds,
        "seconds": plan.hours * 3600,
        "tokens": plan.work.tokens,
        "response_tokens": plan.work.response_tokens * plan.work.rollouts,
        "store_bytes": plan.work.store_bytes,
        "shards": plan.work.shards,
        "objects": plan.work.objects,
        "generator_bytes": plan.generation.need.total,
        "stage_bytes": max(stage.need.total + stage.host_bytes for stage in plan.extraction.stages),
        "bubble": plan.extraction.bubble,
        **core_seconds(plan),
    }


def core_seconds(plan: RunPlan) -> dict[str, float]:
    """CPU time of the workers, which other work on the machine changes less than it does the clock on the wall."""
    made, run = plan.generation, plan.extraction
    assert made is not None
    assert run is not None
    loading = START_SECONDS + plan.shape.whole_bytes(plan.dtype) / DISK
    computing = (made.seconds - loading) * made.devices_each * made.generators
    workers = run.replicas * len(run.stages)
    return {
        "generate_core_seconds": computing + START_SECONDS * made.generators,
        "extract_core_seconds": run.flop / plan.rates.forward_flops + START_SECONDS * workers,
    }


def measure(config: RunConfig, folder: Path | None) -> dict[str, Any]:
    """The same figures of a run: seconds of both steps with their start, without that of Ray and of this process."""
    root = folder or Path(tempfile.mkdtemp(prefix="plan-"))
    config = replace(config, store=replace(config.store, root=str(root), run="measured"))
    job = prepare(
        model=config.model,
        personas=config.personas,
        generate=config.generate,
        extract=config.extract,
        store=config.store,
        execution={"config": asdict(config)},
    )
    started: dict[str, float] = {}
    seconds: dict[str, float] = {}
    tokens: dict[str, int] = defaultdict(int)

    def report(event: Event) -> None:
        if isinstance(event, StepStarted):
            started[event.step] = time.perf_counter()
        elif isinstance(event, Progressed):
            tokens[list(started)[-1]] += event.tokens
        elif isinstance(event, StepFinished):
            seconds[event.step] = time.perf_counter() - started[event.step]

    with hold_run(job, say=print) as fence, ray_cluster(config.cluster), Watch() as memory:
        generate(job, fence, config.cluster, report)
        extract(job, fence, config.cluster, report)
    summary = summarize(job.folder)
    measured = {
        "generate_seconds": seconds["generate"],
        "extract_seconds": seconds["extract"],
        "seconds": seconds["generate"] + seconds["extract"],
        "tokens": tokens["extract"],
        "response_tokens": tokens["generate"],
        "store_bytes": summary.bytes,
        "shards": summary.shards,
        "objects": summary.objects,
        "generator_bytes": memory.of("Generator"),
        "stage_bytes": memory.of("StageActor"),
        "generate_core_seconds": memory.core_seconds("Generator"),
        "extract_core_seconds": memory.core_seconds("StageActor"),
    }
    if folder is None:
        shutil.rmtree(root)
    return measured


class Watch:
    """Largest unshared memory, and CPU time, of this session's Ray workers while it is open, sampled."""

    def __init__(self) -> None:
        self._peaks: dict[str, int] = defaultdict(int)
        self._clocks: dict[int, tuple[str, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def of(self, actor: str) -> int:
        """Bytes of the largest worker whose title holds ``actor``."""
        return max((size for title, size in self._peaks.items() if actor in title), default=0)

    def core_seconds(self, actor: str) -> float:
        """CPU time of all workers whose title held ``actor``."""
        return sum(seconds for title, seconds in self._clocks.values() if actor in title)

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._ended.wait(SAMPLE_SECONDS):
            for process in own.children(recursive=True):
                try:
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::"):
                        self._peaks[title] = max(self._peaks[title], process.memory_full_info().uss)
                        spent = process.cpu_times()
                        self._clocks[process.pid] = (title, spent.user + spent.system)
                except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
                    continue  # It ended meanwhile.


def _save(document: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
