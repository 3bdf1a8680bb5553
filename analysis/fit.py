"""The fit step: from the activation store to the Dataset in ``space/``."""

import time
from collections.abc import Sequence
from typing import Any

import dask
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.cells import LEFT_OUT, cell_of_row, cells_from_sums, lazy_cell_sums, usable_rows
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.evidence import Evidence, gather_evidence
from personaspace.analysis.quality.assess import assess, on_axis
from personaspace.analysis.space import PersonaSpace, align_layers, fit_space
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE, SCENARIO
from personaspace.store.layout import ranges
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import open_run, stored_layers
from personaspace.store.schema import STATUS, ArraySpec
from personaspace.store.space import save_space


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
    layers = stored_layers(folder, manifest, fitted_array(config, manifest.arrays))
    target = target_layer(config, layers)
    run, left_out = _leave_out(folder, open_run(folder).sel(layer=layers), config)
    roles: list[Any] = list(manifest.tables["roles"])
    questions = len(manifest.tables["questions"])
    cell_N = cell_of_row(run, questions)
    count_R = np.bincount(cell_N[cell_N >= 0] // questions, minlength=len(roles))
    default = [index for index, role in enumerate(roles) if role["id"] == DEFAULT_ROLE and count_R[index]]
    # The poles of traits are no roles, and have a space of their own; conversations are no roles at all.
    is_role = [role["id"] != DEFAULT_ROLE and not role.get("pole") and role.get("kind") != SCENARIO for role in roles]
    others = [index for index in range(len(roles)) if is_role[index] and count_R[index]]
    if not default or len(others) < 2:
        raise InputError(
            f"{folder.url}: {len(default)} of `default` and {len(others)} other roles have usable rollouts; the axis "
            "needs `default` and at least two roles. Let extraction go on, then fit again."
        )

    def fit_layer(sum_DC: NDArray[np.float64]) -> tuple[PersonaSpace, Evidence]:
        cells = cells_from_sums(sum_DC, cell_N, len(roles), questions)
        default_cells, role_cells = cells.roles(default), cells.roles(others)
        space = fit_space(default_cells.role_means()[0], role_cells.role_means(), config.components)
        kinds = [roles[index]["kind"] for index in others]
        return space, gather_evidence(space, default_cells, role_cells, kinds, config)

    sums = lazy_cell_sums(run[config.array], cell_N, len(roles) * questions)
    fitted = dask.compute(*(dask.delayed(fit_layer)(sum_DC) for sum_DC in sums))
    spaces = align_layers([space for space, _ in fitted])
    rows = usable_rows(run)
    position_NL, score_NLK = _project(run[config.array], spaces)
    arrays = {
        **_space_arrays(spaces),
        "rollout_position": (("rollout", "layer"), position_NL[rows]),
        "rollout_score": (("rollout", "layer", "component"), score_NLK[rows]),
    }
    for measure in Evidence.__dataclass_fields__:
        arrays[measure] = (("layer",), np.array([getattr(evidence, measure) for _, evidence in fitted]))
    return xr.Dataset(
        {name: (dims, values.astype(np.float32)) for name, (dims, values) in arrays.items()},
        coords={
            "layer": run["layer"].values,
            "role": _text([roles[index]["id"] for index in others]),
            "role_kind": ("role", _text([roles[index]["kind"] for index in others])),
            "role_description": ("role", _text([roles[index]["description"] for index in others])),
            "role_count": ("role", count_R[others]),
            "rollout_row": ("rollout", rows),
            "rollout_role": ("rollout", run["role"].values[rows]),
        },
        attrs={
            "array": config.array,
            "target_layer": target,
            "default_count": int(count_R[default].sum()),
            "null_permutations": config.permutations,
            "positive_kind": config.positive_kind,
            "negative_kind": config.negative_kind,
            "leave_out": ", ".join(config.leave_out),
            "left_out_count": left_out,
            "identity_hash": manifest.identity_hash,
            "fitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


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


def _space_arrays(spaces: list[PersonaSpace]) -> dict[str, tuple[tuple[str, ...], NDArray[np.float64]]]:
    """Name -> (dims, values) of all that the layers' spaces hold."""
    default_LD, axis_LD, origin_LD, scale_LD, component_LKD, variance_ratio_LK = (
        np.stack([getattr(space, name) for space in spaces])
        for name in ("default_D", "axis_D", "origin_D", "scale_D", "component_KD", "variance_ratio_K")
    )
    role_RLD = np.stack([space.role_RD for space in spaces], axis=1)
    centred_RLD = role_RLD - origin_LD
    return {
        "role_vector": (("role", "layer", "hidden"), role_RLD),
        "default_vector": (("layer", "hidden"), default_LD),
        "axis": (("layer", "hidden"), axis_LD),
        "axis_norm": (("layer",), np.linalg.norm(axis_LD, axis=1)),
        "component_vector": (("layer", "component", "hidden"), component_LKD),
        "explained_variance_ratio": (("layer", "component"), variance_ratio_LK),
        "role_score": (("role", "layer", "component"), np.einsum("rld,lkd->rlk", centred_RLD, component_LKD)),
        # default - origin is the axis itself.
        "default_score": (("layer", "component"), np.einsum("ld,lkd->lk", axis_LD, component_LKD)),
        "role_position": (("role", "layer"), np.einsum("rld,ld->rl", centred_RLD, scale_LD)),
    }


def _project(x_NLD: xr.DataArray, spaces: list[PersonaSpace]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions ``(N, L)`` and scores ``(N, L, K)`` of all rows, in a second pass over the stored shards.

    A pass of its own, since within one graph Dask would hold a layer's activations until its axis is known.
    """
    origin_LD, scale_LD, component_LKD = (
        np.stack([getattr(space, name) for space in spaces]) for name in ("origin_D", "scale_D", "component_KD")
    )
    direction_LPD = np.concatenate([scale_LD[:, None], component_LKD], axis=1)
    centred_NLD = x_NLD.astype(np.float64) - xr.DataArray(origin_LD, dims=("layer", "hidden"))
    projected = xr.dot(centred_NLD, xr.DataArray(direction_LPD, dims=("layer", "direction", "hidden")), dim="hidden")
    projected_NLP = projected.transpose("rollout", "layer", "direction").values
    return projected_NLP[:, :, 0], projected_NLP[:, :, 1:]


def _text(values: list[str]) -> NDArray[Any]:
    """Variable-length strings, the only kind that Zarr v3 stores without a warning."""
    return np.array(values, dtype=np.dtypes.StringDType())
