"""The fit step: from the activation store to ``space/``, as one xarray Dataset in Zarr."""

import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from personaspace.analysis.cells import Cells, cell_means, usable_rows
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.evidence import gather_evidence
from personaspace.analysis.space import PersonaSpace, fit_space
from personaspace.store import open_run
from personaspace.store.errors import InputError
from personaspace.store.manifest import read_manifest
from personaspace.store.objects import LocalFolder
from personaspace.store.schema import RESID_POST_MEAN

DEFAULT_ROLE = "default"
SPACE = "space"
LATEST = f"{SPACE}/latest"


def fit(run_folder: Path, config: AnalysisConfig) -> xr.Dataset:
    """Compute axis, persona space, projections and evidence of every layer, and store them beside the run.

    Uses what is committed so far; runs on whatever Dask scheduler is active. Raises InputError if `default` or
    all roles still lack rollouts.
    """
    space = compute_space(run_folder, config)
    save_space(run_folder, space)
    return space


def compute_space(run_folder: Path, config: AnalysisConfig) -> xr.Dataset:
    """The Dataset of ``fit``, not stored."""
    run = open_run(run_folder)
    manifest = read_manifest(LocalFolder(run_folder))
    assert manifest is not None
    roles: list[Any] = list(manifest.tables["roles"])
    target = config.target_layer if config.target_layer is not None else manifest.layout.layers // 2
    if target >= manifest.layout.layers:
        raise InputError(f"analysis.target_layer: {target}; the model has layers 0 to {manifest.layout.layers - 1}.")

    cells = cell_means(run, len(roles), len(manifest.tables["questions"]))
    present = [index for index, role in enumerate(roles) if cells.count_RQ[index].sum() > 0]
    default = [index for index in present if roles[index]["id"] == DEFAULT_ROLE]
    others = [index for index in present if roles[index]["id"] != DEFAULT_ROLE]
    if not default or len(others) < 2:
        raise InputError(
            f"{run_folder}: {len(default)} of `default` and {len(others)} other roles have usable rollouts; the axis "
            "needs `default` and at least two roles. Let extraction go on, then fit again."
        )
    default_cells, role_cells = _take(cells, default), _take(cells, others)
    fitted = fit_space(default_cells.role_means()[0], role_cells.role_means(), config.components)
    evidence = gather_evidence(
        default_cells,
        role_cells,
        [roles[index]["kind"] for index in others],
        positive=config.positive_kind,
        negative=config.negative_kind,
        permutations=config.permutations,
        seed=config.seed,
    )
    role_RLD, default_1LD = role_cells.role_means(), default_cells.role_means()
    position_NL, score_NLK = _project(run, fitted)
    rows = usable_rows(run)
    per_layer = {
        name: ("layer", getattr(evidence, name)) for name in evidence.__dataclass_fields__
    }
    dataset = xr.Dataset(
        {
            "role_vector": (("role", "layer", "hidden"), role_RLD),
            "default_vector": (("layer", "hidden"), default_1LD[0]),
            "axis": (("layer", "hidden"), fitted.axis_LD),
            "axis_norm": ("layer", np.linalg.norm(fitted.axis_LD, axis=1)),
            "component_vector": (("layer", "component", "hidden"), fitted.component_LKD),
            "explained_variance_ratio": (("layer", "component"), fitted.variance_ratio_LK),
            "role_score": (("role", "layer", "component"), fitted.scores(role_RLD)),
            "default_score": (("layer", "component"), fitted.scores(default_1LD)[0]),
            "role_position": (("role", "layer"), fitted.position(role_RLD)),
            "rollout_position": (("rollout", "layer"), position_NL[rows]),
            "rollout_score": (("rollout", "layer", "component"), score_NLK[rows]),
            **per_layer,
        },
        coords={
            "layer": run["layer"].values,
            "role": [roles[index]["id"] for index in others],
            "role_kind": ("role", [roles[index]["kind"] for index in others]),
            "role_description": ("role", [roles[index]["description"] for index in others]),
            "role_count": ("role", role_cells.count_RQ.sum(axis=1)),
            "rollout_row": ("rollout", rows),
            "rollout_role": ("rollout", run["role"].values[rows].astype(object).astype(str)),
        },
        attrs={
            "target_layer": target,
            "default_count": int(default_cells.count_RQ.sum()),
            "null_permutations": config.permutations,
            "positive_kind": config.positive_kind,
            "negative_kind": config.negative_kind,
            "identity_hash": manifest.identity_hash,
            "fitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    return dataset.astype({name: np.float32 for name in dataset.data_vars})


def save_space(run_folder: Path, space: xr.Dataset) -> None:
    """Store the Dataset under a number of its own, then point ``space/latest`` to it: readers never see half."""
    folder = LocalFolder(run_folder)
    previous = folder.get(LATEST).decode() if folder.exists(LATEST) else None
    number = 1 if previous is None else int(previous.removesuffix(".zarr")) + 1
    name = f"{number:04d}.zarr"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        space.to_zarr(run_folder / SPACE / name, mode="w", zarr_format=3)
    folder.replace(LATEST, name.encode())
    if previous is not None:
        shutil.rmtree(run_folder / SPACE / previous, ignore_errors=True)


def open_space(run_folder: Path) -> xr.Dataset:
    """The latest fit of the run. Raises InputError if there is none."""
    folder = LocalFolder(run_folder)
    if not folder.exists(LATEST):
        raise InputError(f"{run_folder}: no persona space yet; run `fit` first.")
    return xr.open_zarr(run_folder / SPACE / folder.get(LATEST).decode())


def _take(cells: Cells, roles: list[int]) -> Cells:
    return Cells(mean_RQLD=cells.mean_RQLD[roles], count_RQ=cells.count_RQ[roles])


def _project(run: xr.Dataset, space: PersonaSpace) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Positions ``(N, L)`` and scores ``(N, L, K)`` of all rows, streamed over the stored shards."""
    activations = run[RESID_POST_MEAN].astype(np.float64) - xr.DataArray(space.role_mean_LD, dims=("layer", "hidden"))
    scale_L = (space.axis_LD**2).sum(axis=1)
    axis = xr.DataArray(space.axis_LD / scale_L[:, None], dims=("layer", "hidden"))
    component = xr.DataArray(space.component_LKD, dims=("layer", "component", "hidden"))
    both = xr.Dataset(
        {"position": xr.dot(activations, axis, dim="hidden"), "score": xr.dot(activations, component, dim="hidden")}
    ).compute()
    return both["position"].transpose("rollout", "layer").values, both["score"].transpose("rollout", "layer", "component").values
