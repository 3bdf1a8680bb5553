"""A comparison as tables and as JSON, for other programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from personaspace.analysis.compare.comparison import MEASURES, NULLS, Pair
from personaspace.analysis.compare.movers import movers
from personaspace.store.formats import tables as tables_of

TABLES = ("layers", "components", "roles", "cka")


def tables(pairs: Sequence[Pair]) -> dict[str, pa.Table]:
    """Name -> table, one row each for: a place, a component at a place, a role at a place, two layers' CKA."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for pair in pairs:
        names, data = {"run_a": pair.a.name, "run_b": pair.b.name}, pair.data
        position, error = (
            data[name].transpose("run", "role", "place").values for name in ("position", "position_error")
        )
        for place in range(data.sizes["place"]):
            at = data.isel(place=place)
            where = names | {key: at[key].item() for key in ("layer_a", "layer_b", "depth_a", "depth_b")}
            rows["layers"].append(where | {"shown": place == pair.at} | _measures(pair, place))
            for component in range(data.sizes["component"]):
                rows["components"].append(where | _component(pair, place, component))
            for row, role in enumerate(data["role"].values):
                values = [float(x) for x in (*position[:, row, place], *error[:, row, place])]
                columns = ("position_a", "position_b", "position_a_error", "position_b_error")
                kind = str(data["role_kind"].values[row])
                numbers = dict(zip(columns, values, strict=True))
                rows["roles"].append(where | {"role": str(role), "kind": kind, **numbers})
        for (row, column), cka in np.ndenumerate(data["cka_layers"].values):
            layers = {"layer_a": int(data["layer_of_a"][row]), "layer_b": int(data["layer_of_b"][column])}
            rows["cka"].append(names | layers | {"cka": float(cka)})
    return {name: pa.Table.from_pylist(entries) for name, entries in rows.items()}


def write_tables(pairs: Sequence[Pair], folder: Path, *, overwrite: bool) -> None:
    """``tables`` as files; see ``store.formats.tables``."""
    tables_of.write_tables(folder, tables(pairs), overwrite=overwrite)


def document(pairs: Sequence[Pair], notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The comparison as plain JSON; ``notes`` are further entries of each pair. Numbers that don't exist are null."""
    runs = {run.name: run for pair in pairs for run in (pair.a, pair.b)}
    return {
        "runs": [
            {"name": run.name, "layers": run.depth, "target_layer": run.target, "roles": run.space.sizes["role"]}
            for run in runs.values()
        ],
        "pairs": [
            {
                "run_a": pair.a.name,
                "run_b": pair.b.name,
                **note,
                "roles_in_common": pair.data.sizes["role"],
                "permutations": pair.data.attrs["permutations"],
                "components": pair.data.attrs["components"],
                "layer_a": pair.layers[0],
                "layer_b": pair.layers[1],
                "measures": _json(_measures(pair, pair.at)),
                "matched_components": [
                    _json(_component(pair, pair.at, component)) for component in range(pair.data.sizes["component"])
                ],
                "roles": [
                    _json({name: getattr(mover, name) for name in mover.__dataclass_fields__}) for mover in movers(pair)
                ],
                "layers": [
                    {
                        "layer_a": int(pair.data["layer_a"][place]),
                        "layer_b": int(pair.data["layer_b"][place]),
                        **_json(_measures(pair, place)),
                    }
                    for place in range(pair.data.sizes["place"])
                ],
            }
            for pair, note in zip(pairs, notes, strict=True)
        ],
    }


def _measures(pair: Pair, place: int) -> dict[str, float]:
    """Every measure at a place, with both nulls; NaN for what was not computed."""
    found = {}
    for name in (measure.name for measure in MEASURES):
        there = name in pair.data
        found[name] = float(pair.data[name][place]) if there else float("nan")
        for null in NULLS:
            bar = pair.data[f"{name}_p99"].sel(null=null)[place] if there else float("nan")
            found[f"{name}_{null}_p99"] = float(bar)
    return found


def _component(pair: Pair, place: int, component: int) -> dict[str, float]:
    """A matched component; components count from 1."""
    at = pair.data.isel(place=place, component=component)
    bars = at["component_correlation_p99"]
    return {
        "component_a": component + 1,
        "component_b": int(at["component_match"]) + 1,
        "correlation": float(at["component_correlation"]),
        **{f"{null}_p99": float(bars.sel(null=null)) for null in NULLS},
    }


def _json(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in entry.items()}
