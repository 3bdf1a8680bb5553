"""The fit step: from the activation store to the Dataset in ``space/``."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.dataset import space_dataset, suggest_layer, text
from personaspace.analysis.groups import Groups, group_name, group_rollouts, pooled
from personaspace.analysis.layer_fit import Plan
from personaspace.analysis.layers import fit_layers
from personaspace.analysis.quality.assess import assess, on_axis
from personaspace.analysis.summary import Rows
from personaspace.store.errors import InputError
from personaspace.store.layout import ranges
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import SHARDS, open_run, stored_layers
from personaspace.store.records import committed_slots
from personaspace.store.schema import STATUS, ArraySpec
from personaspace.store.scores import judges
from personaspace.store.space import save_space

UNFILTERED = "none, although scores were there: analysis.unfiltered"
"""The attribute `filter` of a fit that took every rollout on demand."""
LEFT_OUT = "left_out"
"""Coordinate of rows that are not to be used although nothing is wrong with their activations."""


def fit(folder: Folder, config: AnalysisConfig) -> xr.Dataset:
    """Compute axis, persona space, projections and evidence of every layer, and store them beside the run.

    Uses what is committed so far; runs on whatever Dask scheduler is active. Raises InputError if `default` or
    all roles still lack rollouts.
    """
    space = compute_space(folder, config)
    save_space(folder, space)
    return space


def compute_space(folder: Folder, config: AnalysisConfig) -> xr.Dataset:
    """The Dataset of ``fit``, not stored."""
    manifest = require_manifest(folder)
    spec = fitted_array(config, manifest.arrays)
    layers = stored_layers(folder, manifest, spec)
    target = target_layer(config, layers)
    judge = chosen_judge(folder, config)
    run, left_out = _leave_out(folder, open_run(folder, scores=judge), config)
    rows = usable_rows(run)
    role_N = run["role_id"].values[rows]
    score_N = None if judge is None else run["score"].values[rows]
    roles: list[Mapping[str, Any]] = list(manifest.tables["roles"])
    questions = len(manifest.tables["questions"])
    groups = group_rollouts(
        roles, questions, role_N, score_N, needed=config.min_count, where=folder.url, judge=judge or ""
    )
    cell_N = groups.cell_of_row(role_N, run["question"].values[rows], score_N)
    group_N = np.where((cell_N >= 0) & (cell_N < groups.vector_cells), cell_N // questions, -1)
    plan = Plan(
        rows=Rows(
            row_N=rows,
            cell_N=cell_N,
            pooled_N=pooled(roles, role_N),
            cells=groups.cells,
            unit_rows=manifest.layout.unit_rows,
        ),
        groups=groups,
        kinds=tuple(str(roles[groups.roles[place].role_id]["kind"]) for place in groups.core),
        role_N=group_N,
        question_N=run["question"].values[rows],
        tokens_N=run["n_tokens"].values[rows],
        config=config,
    )
    values = run[config.array].encoding[SHARDS]
    memory = None if config.memory is None else int(config.memory * 1e9)
    space = space_dataset(fit_layers(values, layers, plan, memory=memory), layers)
    suggested, reason = suggest_layer(space)
    return space.assign_coords(_coordinates(run, rows, roles, groups)).assign_attrs(
        {
            "array": config.array,
            "target_layer": target,
            "suggested_layer": suggested,
            "suggested_layer_reason": reason,
            "default_count": groups.default.count,
            "filter": groups.filter if not config.unfiltered else UNFILTERED,
            "too_few": ", ".join(groups.too_few),
            "min_count": groups.needed,
            "standardised": int(config.standardise),
            "null_permutations": config.permutations,
            "bootstrap_draws": config.bootstrap,
            "positive_kind": config.positive_kind,
            "negative_kind": config.negative_kind,
            "leave_out": ", ".join(config.leave_out),
            "left_out_count": left_out,
            "identity_hash": manifest.identity_hash,
            "fitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )


def chosen_judge(folder: Folder, config: AnalysisConfig) -> str | None:
    """The judge whose scores filter the rollouts; None for no filter.

    Raises InputError where the run has scores of several and none is chosen, or none of the chosen one.
    """
    known = judges(committed_slots(folder))
    if config.unfiltered:
        return None
    if config.scores is not None and config.scores not in known:
        raise InputError(
            f"analysis.scores: {config.scores!r} has scored nothing in {folder.url}; "
            f"there are scores of {', '.join(known) or 'nobody'}."
        )
    if config.scores is None and len(known) > 1:
        raise InputError(
            f"{folder.url}: has scores of {', '.join(known)}. Say whose count: --analysis.scores {known[0]}; or take "
            "every rollout: --analysis.unfiltered."
        )
    return config.scores or (known[0] if known else None)


def _coordinates(
    run: xr.Dataset, rows: NDArray[np.intp], roles: Sequence[Mapping[str, Any]], groups: Groups
) -> dict[str, Any]:
    """Who the role vectors, traits and rollouts are."""
    own = [roles[group.role_id] for group in groups.roles]
    names = [group_name(role["id"], group.level) for role, group in zip(own, groups.roles, strict=True)]
    coordinates: dict[str, Any] = {
        "role": text(names),
        "role_kind": ("role", text([role["kind"] for role in own])),
        "role_description": ("role", text([role["description"] for role in own])),
        "role_count": ("role", np.array([group.count for group in groups.roles])),
        "role_level": ("role", text([group.level for group in groups.roles])),
        "rollout_row": ("rollout", rows),
        "rollout_role": ("rollout", run["role"].values[rows]),
    }
    if groups.traits:
        coordinates["trait"] = text([trait for trait, _, _ in groups.traits])
        fewest = [min(positive.count, negative.count) for _, positive, negative in groups.traits]
        coordinates["trait_count"] = ("trait", np.array(fewest))
    return coordinates


def _leave_out(folder: Folder, run: xr.Dataset, config: AnalysisConfig) -> tuple[xr.Dataset, int]:
    """The run with the flawed rollouts that the config names marked, and how many extracted ones that costs."""
    if not config.leave_out:
        return run, 0
    quality = assess(folder)
    flawed_N = np.any([quality.flawed_N[name] for name in config.leave_out], axis=0)
    left_out = on_axis(quality, flawed_N, run.sizes["rollout"])
    lost = int((left_out & (run["status"].values == STATUS.index("ok"))).sum())
    return run.assign_coords({LEFT_OUT: ("rollout", left_out)}), lost


def fitted_array(config: AnalysisConfig, specs: Sequence[ArraySpec]) -> ArraySpec:
    """The array that is fitted. Raises InputError if the run has none of that name with a row for each rollout."""
    known = {spec.name: spec for spec in specs if not spec.spans}
    if config.array not in known:
        raise InputError(f"analysis.array: {config.array!r}; the run has {', '.join(known) or 'none by rollout'}.")
    return known[config.array]


def target_layer(config: AnalysisConfig, layers: Sequence[int]) -> int:
    """The configured target layer, or the middle one of ``layers``. Raises InputError if it is none of them."""
    if config.target_layer is None:
        return layers[len(layers) // 2] if layers else 0
    if layers and config.target_layer not in layers:
        raise InputError(f"analysis.target_layer: {config.target_layer}; the run has layers {ranges(layers)}.")
    return config.target_layer


def usable_rows(run: xr.Dataset) -> NDArray[np.intp]:
    """Rows with status ok that are not left out. Raises InputError if there is none."""
    ok = run["status"].values == STATUS.index("ok")
    rows = np.flatnonzero(ok & ~run[LEFT_OUT].values if LEFT_OUT in run.coords else ok)
    if not ok.any():
        raise InputError(f"{run.attrs['run']}: no extracted rollouts yet; run `extract` first.")
    if not len(rows):
        raise InputError(
            f"analysis.leave_out: leaves none of the {ok.sum()} extracted rollouts; `personaspace quality "
            f"{run.attrs['run']}` shows which flaw they have."
        )
    return rows
