"""A small fitted run, for what reads fits: random activations, written through the store's own commits."""

from dataclasses import replace
from typing import Any

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.store.layout import Layout
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from tests.store.small_runs import ROLES, commit_coordinates, commit_rollouts, commit_shards, create

LAYOUT = Layout(segments=(60,), layers=8, hidden=6, unit_rows=20, layer_group=4)
"""A unit for each of default, poet and hacker."""
DROPPED = 21
"""A row that has no activations."""
EXTRA_ROLES: list[dict[str, Any]] = [
    {"id": "calm.pos", "kind": "trait", "description": "", "prompts": [""], "pole": "pos"},
    {"id": "therapy", "kind": "scenario", "description": "", "prompts": [""]},
]
"""A trait's pole and conversations, without rollouts."""


def write_fitted(folder: LocalFolder, layers: int = LAYOUT.layers, hidden: int = LAYOUT.hidden) -> None:
    """A run and its fit; ``layers``: how many of the layers it has."""
    layout = replace(LAYOUT, hidden=hidden)
    roles = [{"id": role, "kind": "dramatic", "description": role, "prompts": ["A", "B"]} for role in ROLES]
    questions = [{"id": f"q{number}", "category": "any", "text": f"{number}?"} for number in range(3)]
    with acquire(folder, timeout=60, say=print) as lease:
        create(lease.fence, layout, tables={"roles": roles + EXTRA_ROLES, "questions": questions})
        commit_rollouts(lease.fence, layout, range(layout.units))
        groups = range(layers // layout.layer_group)
        commit_shards(lease.fence, layout, [(unit, group) for unit in range(layout.units) for group in groups])
        commit_coordinates(lease.fence, layout, range(layout.units), dropped=[DROPPED])
    fit(folder, AnalysisConfig(permutations=20))
