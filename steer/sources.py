"""From a `steer` section to interventions: directions and thresholds of a run's fit, or of files.

Shape suffixes: L layers, D hidden.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.caps.ranges import parse_range, suggested_ranges
from personaspace.analysis.caps.thresholds import SITE, compute_caps
from personaspace.steer.config import SteerConfig
from personaspace.steer.interventions import Intervention
from personaspace.store.errors import InputError
from personaspace.store.formats.capping_json import read_capping_json
from personaspace.store.formats.directions import CappingConfig, some
from personaspace.store.formats.safetensors_files import read_directions
from personaspace.store.formats.torch_files import is_capping, read_axis, read_capping
from personaspace.store.location import open_folder
from personaspace.store.manifest import require_manifest
from personaspace.store.space import open_space

PERCENTILE = 25.0
"""The paper's (section 5.1.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Direction:
    """What a source says of one direction, by layer."""

    vector: Mapping[int, NDArray[np.float32]]
    """Layer -> the direction, at its own length."""
    depth: int
    """Blocks of the model."""
    target: int
    """Layer that is looked at first."""
    norm: Callable[[int], float]
    """Of a layer: typical length of the residual stream. Raises InputError where the source has none."""
    mean: Callable[[int], float]
    """Of a layer: mean projection on the unit direction. Raises InputError where the source has none."""
    thresholds: Callable[[Sequence[int], float], list[float]]
    """Of layers and a percentile: what a cap lifts to. Raises InputError where the source has none."""


def resolve_interventions(config: SteerConfig) -> tuple[Intervention, ...]:
    """What the section asks for, layer by layer; nothing for one without a source.

    Raises InputError for settings that don't go together, and for a source that can't be read or lacks what is asked.
    """
    if config.source is None:
        given = [name for name, value in asdict(config).items() if value != asdict(SteerConfig())[name]]
        if given:
            raise InputError(f"steer.{given[0]}: has no effect without steer.source. Name a run, an axis or caps.")
        return ()
    _check(config)
    caps = _capping_file(config)
    if caps is not None:
        return _caps_of_file(caps, config)
    found = _of_axis_file(config) if _is_file(config.source) else _of_run(config)
    layers = _layers(config, found)
    return tuple(
        Intervention(
            method=config.method, layer=layer, vector_D=found.vector[layer], value=value, positions=config.positions
        )
        for layer, value in zip(layers, _values(config, found, layers), strict=True)
    )


def intervention_identity(config: SteerConfig, interventions: Sequence[Intervention]) -> dict[str, Any]:
    """What decides the numbers, as JSON: the same for the same change, wherever it was read from."""
    return {
        "method": config.method,
        "positions": config.positions,
        "layers": [intervention.layer for intervention in interventions],
        "values": [round(intervention.value, 6) for intervention in interventions],
        "vectors": hashlib.sha256(b"".join(_unit_bytes(one) for one in interventions)).hexdigest()[:16],
    }


def _unit_bytes(intervention: Intervention) -> bytes:
    vector_D = intervention.vector_D.astype(np.float64)
    # Rounded, so that a file of float32 and the run it came from are the same.
    return np.round(vector_D / np.linalg.norm(vector_D), 6).astype(np.float32).tobytes()


def _check(config: SteerConfig) -> None:
    """Settings that go with other methods only."""
    only = {
        "coefficient": ("add",),
        "percentile": ("cap",),
        "threshold": ("cap",),
        "experiment": ("cap",),
    }
    for name, methods in only.items():
        if getattr(config, name) is not None and config.method not in methods:
            raise InputError(
                f"steer.{name}: {getattr(config, name)} has no effect with steer.method {config.method}, only with "
                f"{' and '.join(methods)}. Remove one of the two."
            )
    if config.method == "add" and config.coefficient is None:
        raise InputError("steer.coefficient: is missing; steer.method add needs how far, such as 0.5 or -0.5.")
    if config.percentile is not None and config.threshold is not None:
        raise InputError("steer.threshold: given together with steer.percentile. Remove one of the two.")
    if config.method == "cap" and config.direction != "axis" and config.threshold is None:
        raise InputError(
            f"steer.direction: {config.direction}, and percentiles are known along the axis only. Give "
            "steer.threshold, or leave steer.direction out."
        )


def _is_file(source: str) -> bool:
    return Path(source).suffix in (".pt", ".safetensors", ".json")


def _capping_file(config: SteerConfig) -> CappingConfig | None:
    file = Path(str(config.source)).expanduser()
    if file.suffix == ".json":
        return read_capping_json(file)
    return read_capping(file) if file.suffix == ".pt" and is_capping(file) else None


def _caps_of_file(caps: CappingConfig, config: SteerConfig) -> tuple[Intervention, ...]:
    asked = {"percentile": config.percentile, "threshold": config.threshold, "layers": config.layers}
    given = [name for name, value in asked.items() if value is not None]
    if given or config.method != "cap":
        name = given[0] if given else "method"
        raise InputError(f"steer.{name}: {config.source} holds caps, whose experiments say that. Remove steer.{name}.")
    if config.experiment is None:
        raise InputError(
            f"steer.experiment: is missing; {config.source} holds {len(caps.experiments)}: {some(caps.experiments)}."
        )
    # The files' vectors point away from the Assistant, and what lies above `cap` is removed: the same from the other
    # side.
    return tuple(
        Intervention(method="cap", layer=cap.layer, vector_D=-cap.vector_D, value=-cap.cap, positions=config.positions)
        for cap in caps.caps(config.experiment)
    )


def _of_axis_file(config: SteerConfig) -> _Direction:
    file = Path(str(config.source)).expanduser()
    if config.direction != "axis":
        raise InputError(f"steer.direction: {config.direction}; {file} holds an axis alone. Name the run instead.")
    if config.experiment is not None:
        raise InputError(f"steer.experiment: {config.experiment}; {file} holds an axis, and no caps.")
    if file.suffix == ".pt":
        axis_LD = read_axis(file)
        layers: Sequence[int] = range(len(axis_LD))
    else:
        directions = read_directions(file)
        if directions.axis_LD is None:
            raise InputError(f"{file}: holds no axis.")
        axis_LD, layers = directions.axis_LD, directions.layers

    def missing(key: str, what: str) -> InputError:
        return InputError(f"{key}: {file} holds directions alone, not {what}. Name the run instead of the file.")

    def no_norm(_: int) -> float:
        raise InputError(
            f"steer.unit: norm; {file} holds directions alone, not how long the residual stream is. Name the run "
            "instead, or use steer.unit vector or residual."
        )

    def no_mean(_: int) -> float:
        raise missing("steer.method: mean_ablate", "mean projections")

    def no_thresholds(_: Sequence[int], __: float) -> list[float]:
        raise missing("steer.percentile", "thresholds (steer.threshold takes one)")

    return _Direction(
        vector=dict(zip(layers, axis_LD, strict=True)),
        depth=max(layers) + 1,
        target=layers[len(layers) // 2],
        norm=no_norm,
        mean=no_mean,
        thresholds=no_thresholds,
    )


def _of_run(config: SteerConfig) -> _Direction:
    if config.experiment is not None:
        raise InputError(f"steer.experiment: {config.experiment}; {config.source} is a run. Give steer.layers instead.")
    folder = open_folder(str(config.source))
    manifest, space = require_manifest(folder), open_space(folder)
    if not str(space.attrs["array"]).startswith(SITE):
        raise InputError(
            f"{folder.url}: the fit is of {space.attrs['array']}; the stream is changed after a block, so fit an array "
            f"of {SITE}: `personaspace fit {folder.url} --analysis.array {SITE}_mean`."
        )
    if "rollout_norm" not in space:
        raise InputError(
            f"{folder.url}: was fitted by an older version. Fit it again: `personaspace fit {folder.url}`."
        )
    vector_LD = _direction_of(space, config.direction, folder.url)
    layers = [int(layer) for layer in space["layer"].values]
    mean_LD = space["rollout_mean"].values.astype(np.float64)

    def mean(layer: int) -> float:
        place = layers.index(layer)
        unit_D = vector_LD[place].astype(np.float64)
        return float(mean_LD[place] @ unit_D / np.linalg.norm(unit_D))

    def thresholds(chosen: Sequence[int], percentile: float) -> list[float]:
        caps = compute_caps(folder, percentiles=[percentile], ranges=[])
        return [float(caps["threshold"].sel(percentile=percentile, layer=layer)) for layer in chosen]

    return _Direction(
        vector=dict(zip(layers, vector_LD, strict=True)),
        depth=manifest.layout.layers,
        target=int(space.attrs["target_layer"]),
        norm=lambda layer: float(space["rollout_norm"].sel(layer=layer)),
        mean=mean,
        thresholds=thresholds,
    )


def _direction_of(space: xr.Dataset, name: str, where: str) -> NDArray[np.float32]:
    """A direction of the fit by its name ``(L, D)``."""
    if name == "axis":
        return np.asarray(space["axis"].values, dtype=np.float32)
    component = re.fullmatch(r"PC(\d+)", name)
    if component is not None and 1 <= int(component[1]) <= space.sizes["component"]:
        return np.asarray(space["component_vector"].isel(component=int(component[1]) - 1).values, dtype=np.float32)
    if name in space["role"].values:
        origin_LD = space["default_vector"].values - space["axis"].values
        return np.asarray(space["role_vector"].sel(role=name).values - origin_LD, dtype=np.float32)
    if "trait" in space.dims and name in space["trait"].values:
        return np.asarray(space["trait_vector"].sel(trait=name).values, dtype=np.float32)
    raise InputError(
        f"steer.direction: {name}; {where} has `axis`, PC1 to PC{space.sizes['component']}, the roles "
        f"{some(space['role'].values)}"
        + (f", the traits {some(space['trait'].values)}." if "trait" in space.dims else ".")
    )


def _layers(config: SteerConfig, found: _Direction) -> list[int]:
    if config.layers is not None:
        chosen = list(parse_range(config.layers, "steer.layers"))
    elif config.method == "add":
        chosen = [found.target]
    elif config.method == "cap":
        chosen = list(suggested_ranges(found.depth)[0])
    else:
        chosen = sorted(found.vector)
    absent = [layer for layer in chosen if layer not in found.vector]
    if absent:
        raise InputError(f"steer.layers: {absent[0]}; {config.source} has the layers {some(sorted(found.vector))}.")
    return chosen


def _values(config: SteerConfig, found: _Direction, layers: Sequence[int]) -> list[float]:
    """Of each layer, in the residual stream's unit."""
    match config.method:
        case "ablate":
            return [0.0] * len(layers)
        case "mean_ablate":
            return [found.mean(layer) for layer in layers]
        case "cap" if config.threshold is not None:
            return [config.threshold] * len(layers)
        case "cap":
            return found.thresholds(layers, config.percentile or PERCENTILE)
    assert config.coefficient is not None
    return [config.coefficient * _unit_length(config, found, layer) for layer in layers]


def _unit_length(config: SteerConfig, found: _Direction, layer: int) -> float:
    """Of what `coefficient` counts."""
    match config.unit:
        case "norm":
            return found.norm(layer)
        case "vector":
            return float(np.linalg.norm(found.vector[layer].astype(np.float64)))
        case "residual":
            return 1.0
