"""The fit step: from the activation store to ``space/``, as one xarray Dataset in Zarr."""

import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.cells import cell_of_row, cells_from_sums, lazy_cell_sums, usable_rows
from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.evidence import Evidence, gather_evidence
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

    questions = len(manifest.tables["questions"])
    cell_N = cell_of_row(run, questions)
    count_R = np.bincount(cell_N[cell_N >= 0] // questions, minlength=len(roles))
    default = [index for index, role in enumerate(roles) if role["id"] == DEFAULT_ROLE and count_R[index]]
    others = [index for index, role in enumerate(roles) if role["id"] != DEFAULT_ROLE and count_R[index]]
    if not default or len(others) < 2:
        raise InputError(
            f"{run_folder}: {len(default)} of `default` and {len(others)} other roles have usable rollouts; the axis "
            "needs `default` and at least two roles. Let extraction go on, then fit again."
        )
    kinds = [roles[index]["kind"] for index in others]

    def fit_layer(sum_DC: NDArray[np.float64]) -> tuple[PersonaSpace, Evidence]:
        cells = cells_from_sums(sum_DC, cell_N, len(roles), questions)
        default_cells, role_cells = cells.roles(default), cells.roles(others)
        space = fit_space(default_cells.role_means()[0], role_cells.role_means(), config.components)
        evidence = gather_evidence(
            space,
            default_cells,
            role_cells,
            kinds,
            positive=config.positive_kind,
            negative=config.negative_kind,
            permutations=config.permutations,
            seed=config.seed,
        )
        return space, evidence

    sums = lazy_cell_sums(run, cell_N, len(roles) * questions)
    layers = dask.compute(*(dask.delayed(fit_layer)(sum_DC) for sum_DC in sums))
    spaces = [space for space, _ in layers]
    position_NL, score_NLK = _project(run, spaces)

    rows = usable_rows(run)
    stacked = {name: np.stack([getattr(space, name) for space in spaces]) for name in PersonaSpace.__dataclass_fields__}
    role_RLD = stacked["role_RD"].swapaxes(0, 1)
    centred_RLD = role_RLD - np.stack([space.origin_D for space in spaces])
    measures = {
        name: ("layer", [getattr(evidence, name) for _, evidence in layers]) for name in Evidence.__dataclass_fields__
    }
    dataset = xr.Dataset(
        {
            "role_vector": (("role", "layer", "hidden"), role_RLD),
            "default_vector": (("layer", "hidden"), stacked["default_D"]),
            "axis": (("layer", "hidden"), stacked["axis_D"]),
            "axis_norm": ("layer", np.linalg.norm(stacked["axis_D"], axis=1)),
            "component_vector": (("layer", "component", "hidden"), stacked["component_KD"]),
            "explained_variance_ratio": (("layer", "component"), stacked["variance_ratio_K"]),
            "role_score": (
                ("role", "layer", "component"),
                np.einsum("rld,lkd->rlk", centred_RLD, stacked["component_KD"]),
            ),
            # default - origin is the axis itself.
            "default_score": (
                ("layer", "component"),
                np.einsum("ld,lkd->lk", stacked["axis_D"], stacked["component_KD"]),
            ),
            "role_position": (
                ("role", "layer"),
                np.einsum("rld,ld->rl", centred_RLD, np.stack([space.scale_D for space in spaces])),
            ),
            "rollout_position": (("rollout", "layer"), position_NL[rows]),
            "rollout_score": (("rollout", "layer", "component"), score_NLK[rows]),
            **measures,
        },
        coords={
            "layer": run["layer"].values,
            "role": _text([roles[index]["id"] for index in others]),
            "role_kind": ("role", _text(kinds)),
            "role_description": ("role", _text([roles[index]["description"] for index in others])),
            "role_count": ("role", count_R[others]),
            "rollout_row": ("rollout", rows),
            "rollout_role": ("rollout", run["role"].values[rows]),
        },
        attrs={
            "target_layer": target,
            "default_count": int(count_R[default].sum()),
            "null_permutations": config.permutations,
            "positive_kind": config.positive_kind,
            "negative_kind": config.negative_kind,
            "identity_hash": manifest.identity_hash,
            "fitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    return dataset.astype(dict.fromkeys(dataset.data_vars, np.float32))


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
    space = xr.open_zarr(run_folder / SPACE / folder.get(LATEST).decode())
    # Much of NumPy does not take the variable-length strings that Zarr reads.
    texts = {name: space[name].astype(object).astype(str) for name in space.coords if space[name].dtype.kind == "T"}
    opened: xr.Dataset = space.assign_coords(texts)
    return opened


def _project(run: xr.Dataset, spaces: list[PersonaSpace]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions ``(N, L)`` and scores ``(N, L, K)`` of all rows, in a second pass over the stored shards.

    A pass of its own, since within one graph Dask would hold a layer's activations until its axis is known.
    """
    origin_LD, scale_LD, component_LKD = (
        np.stack([getattr(space, name) for space in spaces]) for name in ("origin_D", "scale_D", "component_KD")
    )
    direction_LPD = np.concatenate([scale_LD[:, None], component_LKD], axis=1)
    x_NLD = run[RESID_POST_MEAN].astype(np.float64) - xr.DataArray(origin_LD, dims=("layer", "hidden"))
    projected = xr.dot(x_NLD, xr.DataArray(direction_LPD, dims=("layer", "direction", "hidden")), dim="hidden")
    projected_NLP = projected.transpose("rollout", "layer", "direction").values
    return projected_NLP[:, :, 0], projected_NLP[:, :, 1:]


def _text(values: list[str]) -> NDArray[Any]:
    """Variable-length strings, the only kind that Zarr v3 stores without a warning."""
    return np.array(values, dtype=np.dtypes.StringDType())
