"""The cap as a page turns it: any percentile and any range of layers, from one look at a run's fit."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.caps.ranges import suggested_ranges
from personaspace.analysis.caps.thresholds import compute_caps
from personaspace.steer.interventions import Intervention
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import require_manifest
from personaspace.store.space import open_space

PERCENTILES = tuple(float(percentile) for percentile in range(1, 100))


@dataclass(frozen=True, kw_only=True, slots=True)
class Dials:
    """How strong the cap is, and where."""

    percentile: float = 25.0
    """1 to 99: percent of the run's rollouts that it leaves alone. The lower, the stronger."""
    first: int
    last: int
    """Layers ``first`` to ``last`` are capped."""

    def words(self) -> str:
        """For people."""
        where = f"layer {self.first}" if self.first == self.last else f"layers {self.first} to {self.last}"
        return f"p{self.percentile:g} at {where}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CapTable:
    """Thresholds of every layer at every whole percentile."""

    layers: tuple[int, ...]
    axis_LD: NDArray[np.float32]
    threshold_PL: NDArray[np.float64]
    """By `PERCENTILES`."""
    suggested: Dials
    """The paper's setting, at this model's depth."""

    def interventions(self, dials: Dials) -> tuple[Intervention, ...]:
        """What the dials stand at; layers that the fit lacks are left out."""
        place = int(np.clip(round(dials.percentile), 1, len(PERCENTILES))) - 1
        return tuple(
            Intervention(
                method="cap",
                layer=layer,
                vector_D=self.axis_LD[number],
                value=float(self.threshold_PL[place, number]),
            )
            for number, layer in enumerate(self.layers)
            if dials.first <= layer <= dials.last
        )


def read_cap_table(run: Location) -> CapTable:
    """Of the latest fit of ``run``. Raises InputError where there is none."""
    folder = open_folder(run)
    space = open_space(folder)
    caps = compute_caps(folder, percentiles=PERCENTILES, ranges=[])
    layers = tuple(int(layer) for layer in caps["layer"].values)
    chosen = suggested_ranges(require_manifest(folder).layout.layers)[0]
    inside = [layer for layer in chosen if layer in layers] or [layers[len(layers) // 2]]
    return CapTable(
        layers=layers,
        axis_LD=space["axis"].sel(layer=list(layers)).values.astype(np.float32),
        threshold_PL=caps["threshold"].transpose("percentile", "layer").values,
        suggested=Dials(first=inside[0], last=inside[-1]),
    )
