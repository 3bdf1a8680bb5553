"""How conversations move along the Assistant Axis at each dose: the mean position of each turn."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from personaspace.analysis.drift.run import drift_of
from personaspace.analysis.drift.trajectories import Movement, mean_interval, movements
from personaspace.store.location import Location


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Turns:
    """All conversations of a run at one layer, turn by turn. Shape suffixes: T turns."""

    layer: int
    low: float
    high: float
    """The default range: 5% and 95% quantile of the space's default responses."""
    mean_T: NDArray[np.float64]
    interval_T2: NDArray[np.float64]
    """95% (Student) over conversations; NaN for fewer than two."""
    inside_T: NDArray[np.float64]
    """Share of the conversations whose turn does not lie below the range."""
    movement: Movement


def read_turns(run: Location, space: Location, layer: int | None = None) -> Turns:
    """Of a run's conversations in the space of a fitted run; ``layer``: default that of the space.

    Raises InputError where the run has no conversations of two turns, or the two don't fit together.
    """
    return turns_of(drift_of(run, space, layer=layer))


def turns_of(drift: xr.Dataset) -> Turns:
    """Of the conversations of ``drift_of``, at its target layer."""
    at = int(drift.attrs["target_layer"])
    position_CT = drift["position"].sel(layer=at).transpose("conversation", "turn").values
    low, high = drift["default_position"].sel(layer=at).values.tolist()
    there_CT = np.isfinite(position_CT)
    columns = [position_CT[there_CT[:, turn], turn] for turn in range(position_CT.shape[1])]
    return Turns(
        layer=at,
        low=low,
        high=high,
        mean_T=np.array([column.mean() for column in columns]),
        interval_T2=np.array([mean_interval(column) for column in columns]),
        inside_T=np.array([(column >= low).mean() for column in columns]),
        movement=movements(drift, at)[0],
    )
