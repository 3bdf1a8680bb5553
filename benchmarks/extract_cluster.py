"""The price of distribution: Ray stages that write to disk, against one engine with the same threads that doesn't."""

import shutil
import time
from pathlib import Path

import torch
from machine import isolated

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event, ReplicaStarted, Worked
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run, ray_cluster
from personaspace.cluster.watching.occupancy import Interval, Occupancy, occupancy
from personaspace.cluster.window import load_window
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage
from personaspace.store.config import StoreConfig
from personaspace.store.lease import Fence

RESPONSES = Path(__file__).parents[2] / "shared" / "reference" / "parity" / "responses"
"""84 finished rollouts."""
STAGES = 2
TOKEN_BUDGET = 512
"""Small, so that few rollouts make many micro-batches."""


def measure_cluster(model: str, responses: Path, folder: Path, pairs: int) -> dict[str, list[float]]:
    """Seconds of each pair's two runs over the same micro-batches, model loading and start-up left out.

    Also how idle the stages are (cluster/watching/occupancy.py), from when they say that they ran forward passes.
    """
    figures: dict[str, list[float]] = {"ray": [], "engine": [], "micro_batches": []}
    shares: dict[str, list[float]] = {"idle": [], "imbalance": [], "bubble": []}
    cluster = ClusterConfig(stages=STAGES)
    with ray_cluster(cluster):
        for pair in range(pairs):
            shutil.rmtree(folder, ignore_errors=True)
            job = prepare(
                model=ModelConfig(id=model, dtype="bfloat16"),
                personas=PersonasConfig(),
                generate=GenerateConfig(responses=str(responses)),
                extract=ExtractConfig(micro_batch_tokens=TOKEN_BUDGET),
                store=StoreConfig(root=str(folder), run="run"),
                execution={},
            )
            with hold_run(job, say=print) as fence:
                generate(job, fence, cluster, lambda _: None)
                windows = [load_window(job, window, job.manifest.arrays) for window in job.windows]
                figures["micro_batches"].append(sum(len(window.batches) for window in windows))
                for name in ("ray", "engine") if pair % 2 else ("engine", "ray"):
                    if name == "engine":
                        figures[name].append(isolated(_engine, job, STAGES))
                        continue
                    seconds, found = _stages(job, fence, cluster)
                    figures[name].append(seconds)
                    for share, values in shares.items():
                        values.append(getattr(found, share))
    shutil.rmtree(folder, ignore_errors=True)
    return {**figures, **shares}


def _stages(job: Job, fence: Fence, cluster: ClusterConfig) -> tuple[float, Occupancy]:
    """Seconds from when the stage actors have loaded and checked their layers until all is committed on disk."""
    starts: list[float] = []
    passes: list[list[Interval]] = [[] for _ in range(STAGES)]

    def report(event: Event) -> None:
        if isinstance(event, ReplicaStarted):
            starts.append(time.perf_counter())
        elif isinstance(event, Worked):
            for stage, busy in enumerate(event.busy):
                if busy.activity == "forward":
                    passes[stage].append((busy.start, busy.stop))

    extract(job, fence, cluster, report)
    return time.perf_counter() - starts[0], occupancy(passes)


def _engine(job: Job, threads: int) -> float:
    """One stage in a process of its own, over the job's micro-batches; writes nothing."""
    torch.set_num_threads(threads)
    checkpoint = job.checkpoint
    stage = Stage(load_slice(checkpoint, first=0, stop=checkpoint.layers, dtype=job.model.settled_dtype))
    windows = [load_window(job, window, job.manifest.arrays) for window in job.windows]
    stage.forward(*stage.probe((16, 8)))
    start = time.perf_counter()
    for window in windows:
        for batch in window.batches:
            stage.forward(batch).pooled()
    return time.perf_counter() - start
