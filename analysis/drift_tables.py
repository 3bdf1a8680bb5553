"""The numbers of persona drift as tables: a row for each conversation and layer, and one for each turn and layer."""

import pyarrow as pa
import pyarrow.compute as pc
import xarray as xr

LABELS = ["row", "rollout_id", "domain", "scenario", "sample", "layer"]


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


def _table(values: xr.Dataset, dims: list[str], columns: list[str]) -> pa.Table:
    frame = values.to_dataframe(dim_order=dims).reset_index().rename(columns={"conversation": "row"})
    # NaN becomes null: both formats, and JSON, have a way to say that.
    return pa.Table.from_pandas(frame[columns], preserve_index=False)
