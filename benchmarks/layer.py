"""One layer at the paper's scale, 331,200 rollouts of 8,192 dimensions, fitted from disk; and what 80 would take.

    python benchmarks/layer.py --json out.json
    python benchmarks/layer.py --quick

The layer is made block by block, never whole in memory: 276 roles with 1,200 rollouts each (5 prompts x 240
questions), with a place for every role along a few directions, an offset for every question, 64 more directions and
noise. It lies in the store's own shards. Fitting it is all that `personaspace fit` does of a layer: moments and cells
in one pass, axis, PCA of roles and of all rollouts, evidence with its default draws, and places of all rollouts in a
second pass. The floor is one read of the layer with one symmetric product (float32) and nothing else. CPU seconds are
user and system time; peak is resident memory above that of a process that has imported everything.

Legend: N rollouts, R roles, Q questions, D hidden.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, isolated, peak, reset_peak
from scipy.linalg.blas import ssyrk

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.groups import group_rollouts, pooled
from personaspace.analysis.layer_fit import Plan
from personaspace.analysis.layers import fit_layers
from personaspace.analysis.summary import Rows
from personaspace.store.layout import Layout, shard_key
from personaspace.store.local import LocalFolder
from personaspace.store.schema import encode_shard
from personaspace.store.shards import CommittedShards

ARRAY, UNIT_ROWS, RANK, PROMPTS = "resid_post_mean", 120, 64, 5
PAPER_LAYERS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How large the layer is."""

    roles: int = 276
    questions: int = 240
    hidden: int = 8192

    @property
    def rows(self) -> int:
        return self.roles * PROMPTS * self.questions


QUICK = Scale(roles=12, questions=24, hidden=256)


def write_layer(folder: Path, scale: Scale) -> CommittedShards:
    """The layer in shards of 120 rollouts."""
    layout = Layout(segments=(scale.rows,), layers=1, hidden=scale.hidden, unit_rows=UNIT_ROWS, layer_group=1)
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    role_RD = normal(scale.roles, 8) @ normal(8, scale.hidden) + np.float32(0.3) * normal(scale.roles, scale.hidden)
    question_QD = normal(scale.questions, scale.hidden)
    direction_KD = normal(RANK, scale.hidden) * np.geomspace(2, 0.1, RANK, dtype=np.float32)[:, None] / 8
    mean_D = 3 * normal(scale.hidden)
    for unit in range(layout.units):
        row_N = np.arange(unit * UNIT_ROWS, (unit + 1) * UNIT_ROWS)
        x_ND = mean_D + role_RD[row_N // (PROMPTS * scale.questions)] + question_QD[row_N % scale.questions]
        x_ND += normal(UNIT_ROWS, RANK) @ direction_KD + normal(UNIT_ROWS, scale.hidden)
        file = folder / shard_key(ARRAY, unit, 0)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_shard(x_ND[:, None], layout, "16"))
    return CommittedShards(LocalFolder(folder), ARRAY, layout, np.zeros((layout.units, 1), dtype=int))


def floor(values: CommittedShards, _: Scale) -> None:
    """One read, one symmetric product."""
    scatter_DD = np.zeros((values.shape[2],) * 2, dtype=np.float32)
    for start in range(0, values.shape[0], 17 * UNIT_ROWS):
        x_ND = values[slice(start, start + 17 * UNIT_ROWS), 0, slice(None)]
        ssyrk(1.0, x_ND.T, beta=1.0, c=scatter_DD.T, overwrite_c=1)


def fit_layer(values: CommittedShards, scale: Scale) -> None:
    """All that `personaspace fit` does of a layer."""
    names = ["default", *(f"role{number}" for number in range(1, scale.roles))]
    kinds = ["assistant", *(("professional", "fantastical")[number % 2] for number in range(1, scale.roles))]
    roles: list[dict[str, Any]] = [
        {"id": name, "kind": kind, "description": ""} for name, kind in zip(names, kinds, strict=True)
    ]
    row_N = np.arange(scale.rows)
    role_N, question_N = row_N // (PROMPTS * scale.questions), row_N % scale.questions
    groups = group_rollouts(roles, scale.questions, role_N, None, needed=None, where="layer")
    cell_N = groups.cell_of_row(role_N, question_N, None)
    plan = Plan(
        rows=Rows(row_N=row_N, cell_N=cell_N, pooled_N=pooled(roles, role_N), cells=groups.cells, unit_rows=UNIT_ROWS),
        groups=groups,
        kinds=tuple(kinds[1:]),
        role_N=role_N,
        question_N=question_N,
        tokens_N=np.random.default_rng(1).integers(20, 300, size=scale.rows),
        config=AnalysisConfig(),
    )
    [fitted] = fit_layers(values, [0], plan, memory=None)
    assert np.isfinite(fitted.evidence.observed.kind_auc)


def measure(work: str, values: CommittedShards, scale: Scale) -> dict[str, float]:
    """CPU seconds, seconds and peak bytes of `floor` or `fit_layer`, on all cores."""
    before, start, clock = reset_peak(), os.times(), time.perf_counter()
    {"floor": floor, "fit": fit_layer}[work](values, scale)
    end = os.times()
    return {
        "cpu_seconds": end.user - start.user + end.system - start.system,
        "seconds": time.perf_counter() - clock,
        "peak_bytes": float(peak() - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where 12 GB lie for a while")
    parser.add_argument("--quick", action="store_true", help="1,440 rollouts of 256 dimensions")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else Scale()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        start = time.perf_counter()
        values = write_layer(Path(scratch), scale)
        size = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        print(f"{scale.rows:,} x {scale.hidden:,}: {size / 1e9:.2f} GB, made in {time.perf_counter() - start:.0f} s")
        figures: dict[str, Any] = {"machine": describe_machine(arguments.folder), "rows": scale.rows, "bytes": size}
        for work in ("floor", "fit"):
            figures[work] = found = isolated(measure, work, values, scale)
            print(
                f"{work:6s}{found['cpu_seconds']:9.1f} CPU s {found['seconds']:9.1f} s, "
                f"peak {found['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    figures["fit_over_floor"] = figures["fit"]["cpu_seconds"] / figures["floor"]["cpu_seconds"]
    figures["hours_of_80_layers"] = PAPER_LAYERS * figures["fit"]["seconds"] / 3600
    print(f"fit_over_floor: {figures['fit_over_floor']:.2f}")
    print(f"{PAPER_LAYERS} layers, one after the other on this machine: {figures['hours_of_80_layers']:.2f} h")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
