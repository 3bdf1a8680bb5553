"""Runs that are exported: small ones with system prompts, scores and a fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.store.commit import commit
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import ROLLOUTS
from personaspace.store.rollouts import encode_rollouts
from personaspace.store.scores import Score, commit_scores
from tests.store import small_runs

PLACE = {
    "assistant-axis": "out",
    "safetensors": "d.safetensors",
    "gguf": "d.gguf",
    "parquet": "d.parquet",
    "dataset": "out",
    "tables": "out",
    "transcripts": "out",
}
"""Format -> a name for what is exported."""


def quiet(_: str) -> None:
    """For `say`."""


def make(path: Path, fill: Callable[[Fence], object]) -> LocalFolder:
    folder = LocalFolder(path)
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        fill(lease.fence)
    return folder


def rollouts_with_system_prompts(fence: Fence) -> None:
    """Those of the small runs, as prompted."""
    rows = small_runs.planned()
    for unit in range(small_runs.LAYOUT.units):
        planned = small_runs.LAYOUT.unit_row_range(unit)
        chosen = [
            replace(small_runs.rollout(row), messages=[{"role": "system", "content": "AB"[row.prompt]}, *rest])
            for row in rows
            if row.row in planned
            for rest in [small_runs.rollout(row).messages]
        ]
        objects = {rollouts_key(unit): encode_rollouts(chosen)}
        commit(fence, (ROLLOUTS, unit, 0), objects, rows=planned, dropped={})


def fitted_run(path: Path) -> LocalFolder:
    """A run as we generate them; row 5 (`poet`) is dropped; scored by one judge, in part; fitted."""

    def fill(fence: Fence) -> None:
        small_runs.create(fence)
        rollouts_with_system_prompts(fence)
        small_runs.commit_shards(fence, small_runs.LAYOUT, small_runs.ALL)
        small_runs.commit_coordinates(fence, small_runs.LAYOUT, range(3), dropped=[5])
        commit_scores(fence, small_runs.LAYOUT, "gpt", 0, [Score(row=0, score=3), Score(row=3, score=1)])

    folder = make(path, fill)
    fit(folder, AnalysisConfig(permutations=5, components=1, unfiltered=True))
    return folder
