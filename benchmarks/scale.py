"""The extract step on clusters that we don't have: 331,200 rollouts of Llama 3.3 70B on 8 to 1,024 GPUs, simulated.

    python benchmarks/scale.py                    # a minute; the tables of docs/scale.md
    python benchmarks/scale.py --quick --json out.json

The real schedule drives simulated machines (cluster/simulation/simulate.py; assumptions in scenario.py beside it). The
same figures each time. Where nodes fail, medians of five seeds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from personaspace.cluster.simulation.scenario import DriverCosts, Machines, Scenario
from personaspace.cluster.simulation.simulate import Outcome, simulate

SIZES = (8, 64, 512, 1024)
SEEDS = 5
WINDOWS_PER_REPLICA = 16
REQUEST = 0.015
"""Seconds that an object store takes for a small request."""
REMOTE = DriverCosts(coordinates_wait=16 * REQUEST, load_wait=3 * REQUEST)
"""A unit's coordinates are 16 requests one after another, its rollouts 3."""
OFFLOADED = DriverCosts(coordinates=0.0, load=0.0)
"""Other processes than the driver's load windows and commit coordinates."""


def suited_rows(scenario: Scenario) -> int:
    """Window rows, at most the default, that give each replica so many windows; whole units."""
    unit = scenario.shape.unit_rows
    units = scenario.rollouts // (WINDOWS_PER_REPLICA * scenario.replicas * unit)
    return max(unit, min(scenario.window_rows, units * unit))


def scenarios(gpus: int) -> list[Scenario]:
    """What is simulated for a cluster of so many GPUs."""
    base = Scenario(name="default settings", machines=Machines(gpus=gpus))
    suited = replace(base, name="suited windows", window_rows=suited_rows(base))
    near = replace(suited, name="+ checkpoint on the nodes", machines=Machines(gpus=gpus, on_nodes=True))
    return [
        base,
        suited,
        near,
        replace(near, name="+ 10% slow, one at a third", machines=replace(near.machines, slow=0.1)),
        replace(near, name="+ nodes fail every 50 h", machines=replace(near.machines, mtbf_hours=50)),
        replace(near, name="+ nodes fail every 2 h", machines=replace(near.machines, mtbf_hours=2)),
        replace(near, name="+ run on storage of 1 GB/s", machines=replace(near.machines, write=1e9)),
        replace(near, name="+ run in an object store", costs=REMOTE),
        replace(near, name="+ idle driver", costs=OFFLOADED),
    ]


def summarize(scenario: Scenario, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Medians over the seeds."""
    rows = [
        {
            "seconds": outcome.seconds,
            "ideal": outcome.ideal,
            "efficiency": outcome.efficiency,
            "working_efficiency": outcome.working_efficiency,
            "bubble": outcome.bubble,
            "driver_busy": outcome.driver_busy,
            "calls_per_s": outcome.calls_per_s,
            "repeated": outcome.repeated,
            "lost_replicas": outcome.lost_replicas,
            "padding": outcome.padding,
            "windows": outcome.windows,
            "micro_batches": outcome.micro_batches,
            "waiting_for": outcome.waiting_for,
            **{f"share_{name}": share for name, share in asdict(outcome.shares).items()},
            **{f"driver_{name}_s": seconds for name, seconds in outcome.driver.items()},
        }
        for outcome in outcomes
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    medians = {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names}
    return {"name": scenario.name, "gpus": scenario.machines.gpus, "window_rows": scenario.window_rows, **medians}


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| scenario | windows | time, s | efficiency | after loading | bubble | tail | driver busy | calls/s | again |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['windows']:,} of {row['window_rows']:,} | {row['seconds']:,.0f} | "
        f"{row['efficiency']:.0%} | {row['working_efficiency']:.0%} | {row['bubble']:.1%} | {row['share_tail']:.1%} | "
        f"{row['driver_busy']:.0%} | {row['calls_per_s']:,.0f} | {row['repeated']:,.0f} |"
        for row in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rollouts, two sizes, one seed")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    begin = time.perf_counter()
    for gpus in SIZES[:2] if arguments.quick else SIZES:
        rows = []
        for planned in scenarios(gpus):
            scenario = replace(planned, rollouts=planned.rollouts // 20) if arguments.quick else planned
            seeds = SEEDS if scenario.machines.mtbf_hours and not arguments.quick else 1
            rows.append(summarize(scenario, [simulate(replace(scenario, seed=seed)) for seed in range(seeds)]))
        print(f"\n### {gpus:,} GPUs: ideal {rows[0]['ideal']:,.0f} s\n\n{table(rows)}")
        found += rows
    print(f"\n{time.perf_counter() - begin:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"scenarios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
