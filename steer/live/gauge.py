"""Where a response lies on the Assistant Axis: the scale of a run's fit, for projections that are made elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.caps.thresholds import compute_caps
from personaspace.store.errors import InputError
from personaspace.store.layout import ranges
from personaspace.store.location import Location, open_folder
from personaspace.store.space import open_space


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gauge:
    """The axis at one layer. Projections are <h, v> with the unit axis v, in the residual stream's unit."""

    layer: int
    axis_D: NDArray[np.float32]
    role_mean: float
    """Projection of the mean role: position 0."""
    default_mean: float
    """Projection of the mean default response: position 1."""
    low: float
    high: float
    """The default range, as positions: 5% and 95% quantile of the run's default responses."""

    def position(self, projection: float) -> float:
        """0 at the mean role, 1 at the mean default response."""
        return (projection - self.role_mean) / (self.default_mean - self.role_mean)

    def check_model(self, name: str, layers: int, hidden: int) -> None:
        """Raise InputError for a model of another shape."""
        if len(self.axis_D) != hidden or self.layer >= layers:
            raise InputError(
                f"{name} has {layers} layers of {hidden} dimensions; the axis is of layer {self.layer} with "
                f"{len(self.axis_D)}. Name a run of this model."
            )


def read_gauge(run: Location, layer: int | None, setting: str) -> Gauge:
    """Of one layer; None: that which the fit suggests. Raises InputError, which names the ``setting``."""
    gauges = read_gauges(run)
    chosen = int(open_space(open_folder(run)).attrs["target_layer"]) if layer is None else layer
    if chosen not in gauges:
        raise InputError(f"{setting}: {chosen}; the fit has the layers {ranges(sorted(gauges))}.")
    return gauges[chosen]


def read_gauges(run: Location) -> Mapping[int, Gauge]:
    """Of every fitted layer. Raises InputError where there is no fit, or none of the residual stream after blocks."""
    folder = open_folder(run)
    space, caps = open_space(folder), compute_caps(folder, percentiles=[25.0], ranges=[])
    if "default" not in caps["group"].values:
        raise InputError(f"{folder.url}: the fit has no default responses, so there is no default range.")
    gauges = {}
    for layer in (int(layer) for layer in space["layer"].values):
        at = caps.sel(layer=layer)
        role_mean, default_mean = float(at["role_mean"]), float(at["default_mean"])
        default = at["projection"].sel(group="default")
        low, high = (float(default.sel(quantile=quantile)) for quantile in (0.05, 0.95))
        length = default_mean - role_mean
        gauges[layer] = Gauge(
            layer=layer,
            axis_D=space["axis"].sel(layer=layer).values.astype(np.float32),
            role_mean=role_mean,
            default_mean=default_mean,
            low=(low - role_mean) / length,
            high=(high - role_mean) / length,
        )
    return gauges
