"""What distribution costs: pipeline stages against one engine, the stages' idle time, and the driver's calls.

    python benchmarks/cluster.py                         # SmolLM2-135M (make demo fetches it); half an hour
    python benchmarks/cluster.py --quick --json out.json

- engine: two one-thread stages that write to disk, over one two-thread engine that writes nothing; the same
  micro-batches, in pairs. `pipeline_over_engine` is the ratio of throughputs, above 1 where the pipeline is faster.
- `bubble`, from the same runs: share of the time between a stage's first and last forward pass in which it runs none,
  mean over the stages, without what remains because one stage has less to do (cluster/watching/occupancy.py).
- driver: micro-batches (through two stages) and commits that the real supervisor sends and handles per second, with
  Ray actors that do nothing. `driver_calls_per_s` is that of 16 replicas, 32 actors.
- work: what the driver does for each window of a real run, with stages that compute nothing.

The last two are what cluster/simulation/scenario.py takes for the driver's costs.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from cluster_driver import measure_loop, measure_parts
from cluster_work import measure_work
from extract_cluster import RESPONSES, measure_cluster
from machine import describe_machine
from ratios import ratio, show

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.session import ray_cluster
from personaspace.extract.demo_model import DEFAULT_FOLDER

LOOPS = ((1, 1, False), (4, 2, False), (16, 2, False), (128, 2, True), (512, 2, True))
"""Replicas, stages, and whether eight actors stand for all."""
HEADLINE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_FOLDER), help="checkpoint folder")
    parser.add_argument("--responses", type=Path, default=RESPONSES, help="folder of ROLE.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-run"), help="scratch for the runs that write")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="2 pairs, few calls")
    parser.add_argument("--only", choices=("engine", "driver", "work"), help="one part of it")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    quick = arguments.quick
    figures: dict[str, Any] = {"machine": describe_machine(Path.cwd())}

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")

    if arguments.only in (None, "engine"):
        found = measure_cluster(arguments.model, arguments.responses, arguments.folder, 2 if quick else arguments.pairs)
        faster = ratio(found["engine"], found["ray"])
        figures["engine"] = {**found, "ratio": faster}
        figures["pipeline_over_engine"] = faster["median"]
        show(f"throughput of two stages over one engine ({found['micro_batches'][0]} micro-batches)", faster)
        for share in ("idle", "imbalance", "bubble"):
            print(f"{share}: median {statistics.median(found[share]):.1%}")
        figures["bubble"] = statistics.median(found["bubble"])
        save()
    if arguments.only in (None, "driver"):
        figures["loop"] = []
        loops = LOOPS[1 : HEADLINE + 1] if quick else LOOPS
        for replicas, stages, emulated in loops:
            with ray_cluster(ClusterConfig()):
                row = measure_loop(replicas, stages, 500 if quick else 10_000, emulated=emulated)
            figures["loop"].append({**row, "emulated": emulated})
            print(
                f"{replicas} replica(s) of {stages}{', emulated' if emulated else ''}: {row['calls_per_s']:,.0f} "
                f"calls/s, {row['driver_s_per_call'] * 1e6:.0f} us of the driver each"
            )
            save()
        figures["driver_calls_per_s"] = figures["loop"][loops.index(LOOPS[HEADLINE])]["calls_per_s"]
        with ray_cluster(ClusterConfig()):
            figures["parts"] = measure_parts(30 if quick else 300, random.Random(0))
        print("seconds of the driver: " + json.dumps(figures["parts"]))
        save()
    if arguments.only in (None, "work"):
        with ray_cluster(ClusterConfig()):
            roles, window_rows = (4, 240) if quick else (34, 2040)
            figures["work"] = measure_work(arguments.model, arguments.folder, roles, window_rows)
        print("seconds of the driver: " + json.dumps(figures["work"]))
        save()


if __name__ == "__main__":
    main()
