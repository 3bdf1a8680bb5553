"""The numbers of persona drift as tables: a row for each conversation and layer, and one for each turn and layer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr

from personaspace.analysis.drift.trajectories import movements
from personaspace.store.formats import tables as tables_of

LABELS = ["row", "rollout_id", "domain", "scenario", "sample", "layer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One conversation at one layer."""

    name: str
    turns: int
    first: float
    """Position of its first turn."""
    last: float
    """Position of its last turn."""
    slope: float
    """Position per turn (Theil-Sen)."""
    slope_interval: tuple[float, float]
    """95%; NaN below four turns."""
    below: int
    """Turns below the default range."""
    first_below: int
    """The first of them, 0-based; -1 where there is none."""


def name_of(drift: xr.Dataset, number: int) -> str:
    """A conversation's name: its scenario, and which of its repetitions it is, where there are several."""
    scenario, sample = str(drift["scenario"].values[number]), int(drift["sample"].values[number])
    return f"{scenario} #{sample + 1}" if (drift["sample"].values > 0).any() else scenario


def largest(drift: xr.Dataset, count: int) -> list[Way]:
    """The conversations of ``drift_of`` with the largest drift at its target layer, in either direction."""
    at = drift.sel(layer=drift.attrs["target_layer"])
    ways = []
    for number in np.argsort(-np.abs(at["drift"].values), kind="stable")[:count].tolist():
        own = at.isel(conversation=number)
        position_T = own["position"].values[own["tokens"].values > 0]
        low, high = own["slope_interval"].values.tolist()
        ways.append(
            Way(
                name=name_of(drift, number),
                turns=len(position_T),
                first=float(position_T[0]),
                last=float(position_T[-1]),
                slope=float(own["slope"]),
                slope_interval=(low, high),
                below=int(own["below"]),
                first_below=int(own["first_below"]),
            )
        )
    return ways


def conversations_table(drift: xr.Dataset) -> pa.Table:
    """How each conversation of ``drift_of`` moves. Turns count from 0; ``first_below`` is null where none is below."""
    low, high = (drift["slope_interval"].sel(bound=bound, drop=True) for bound in ("low", "high"))
    moves = drift[["drift", "slope", "below", "above", "first_below"]].assign(slope_low=low, slope_high=high)
    moves = moves.assign(first_below=moves["first_below"].where(moves["first_below"] >= 0))
    columns = ["turns", "drift", "slope", "slope_low", "slope_high", "below", "above", "first_below"]
    table = _table(moves, ["conversation", "layer"], [*LABELS, *columns])
    place = table.schema.get_field_index("first_below")
    return table.set_column(place, "first_below", table["first_below"].cast(pa.int64()))


def turns_table(drift: xr.Dataset) -> pa.Table:
    """Where each turn of ``drift_of`` lies: its position, and its scores on the leading components ``pc1`` and on."""
    scores = {
        f"pc{number + 1}": drift["score"].sel(component=component, drop=True)
        for number, component in enumerate(drift["component"].values)
    }
    table = _table(
        drift[["position"]].assign(scores),
        ["conversation", "layer", "turn"],
        [*LABELS, "turn", "tokens", "position", *scores],
    )
    return table.filter(pc.greater(table["tokens"], 0))


def write_tables(drift: xr.Dataset, folder: Path, *, overwrite: bool = False) -> None:
    """Write both tables to ``folder``, each as CSV and as Parquet.

    Raises InputError where the folder holds anything but earlier tables, unless ``overwrite``, which leaves the rest.
    """
    tables = {"turns": turns_table(drift), "conversations": conversations_table(drift)}
    ours = folder.is_dir() and {entry.name for entry in folder.iterdir()} <= set(tables_of.table_files(tables))
    tables_of.write_tables(folder, tables, overwrite=overwrite or ours)


def document(drift: xr.Dataset) -> dict[str, Any]:
    """All numbers of ``drift_of``, ready for JSON: null where there is none."""
    layers = [int(layer) for layer in drift["layer"].values]
    return {
        **{name: drift.attrs[name] for name in ("run", "space", "model", "array", "target_layer", "notes")},
        "default_rollouts": drift.attrs["default_count"],
        "quantiles": drift.attrs["quantiles"],
        "layers": [
            {
                "layer": layer,
                "default_range": drift["default_position"].sel(layer=layer).values.tolist(),
                "groups": [
                    asdict(one) | {"drift_interval": _plain(one.drift_interval)} for one in movements(drift, layer)
                ],
            }
            for layer in layers
        ],
        "conversations": conversations_table(drift).to_pylist(),
        "turns": turns_table(drift).to_pylist(),
    }


def _plain(values: Sequence[float]) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values]


def _table(values: xr.Dataset, dims: list[str], columns: list[str]) -> pa.Table:
    frame = values.to_dataframe(dim_order=dims).reset_index().rename(columns={"conversation": "row"})
    # NaN becomes null: both formats, and JSON, have a way to say that.
    return pa.Table.from_pandas(frame[columns], preserve_index=False)
