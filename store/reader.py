"""Reading a run: a lazy xarray Dataset in which only committed data is visible."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from personaspace.store.commit import COORDINATES_RECORD, Slot, committed_slots
from personaspace.store.committed import CommittedStore
from personaspace.store.errors import InputError
from personaspace.store.index import read_index
from personaspace.store.location import open_folder
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.plan import read_plan
from personaspace.store.schema import COORDINATES, PARTS, SPAN_COORDINATES, SPANS, STATUS, ArraySpec
from personaspace.store.scores import judges, read_scores


def open_run(url: str | Path | Folder, *, scores: str | None = None) -> xr.Dataset:
    """Open a run as a lazy Dataset with Dask chunks along its shards.

    Arrays have dims ``(rollout, layer, hidden)``, float32. Rows and layers without a commit record read as NaN, and
    their ``status`` as 0 (pending), whatever lies in the store. Coordinates of the rollouts: ``rollout_id``,
    ``role``, ``role_id``, ``prompt``, ``question``, ``question_id``, ``sample``, ``n_tokens``, ``status``, and
    ``score`` (NaN where there is none) by the judge version ``scores``, or by the only one. Selecting reads only
    the chunks that it needs; see also ``select``.

    Raises InputError if there is no run at ``url``, IntegrityError when damaged data is met.

    >>> run = open_run("runs/demo")                                                      # doctest: +SKIP
    >>> select(run, role="ghost", layer=20)["resid_post_mean"].mean("rollout").values    # doctest: +SKIP
    """
    folder = open_folder(url) if isinstance(url, str | Path) else url
    manifest = require_manifest(folder)
    committed = committed_slots(folder)
    opened = _open_group(folder, manifest, committed, spans=False)
    plan = read_plan(folder, manifest)
    rows = np.array([entry.row for entry in plan], dtype=np.intp)
    roles, questions = manifest.tables["roles"], manifest.tables["questions"]

    def planned(values: Sequence[Any], padding: Any, dtype: Any) -> xr.Variable:
        column = np.full(manifest.layout.padded_rows, padding, dtype=dtype)
        column[rows] = np.array(values, dtype=dtype)
        return xr.Variable("rollout", column)

    coordinates: dict[str, Any] = {
        "rollout_id": planned([entry.rollout_id for entry in plan], "", object),
        "role": planned([roles[entry.role_id]["id"] for entry in plan], "", object),
        "question_id": planned([questions[entry.question]["id"] for entry in plan], "", object),
    }
    for name in ("role_id", "prompt", "question", "sample"):
        coordinates[name] = planned([getattr(entry, name) for entry in plan], -1, np.int32)
    for name, column in read_index(folder, manifest, committed).items():
        coordinates[name] = xr.Variable("rollout", column)
    score = read_scores(folder, manifest.layout, scores)
    if score is not None:
        coordinates["score"] = xr.Variable("rollout", score)
    opened = opened.assign_coords(coordinates)
    opened.attrs = _attributes(folder, manifest, committed, coordinates["status"].values)
    return opened


def open_spans(url: str | Path | Folder) -> xr.Dataset:
    """Open a run's arrays with a row for each span: an assistant turn, or its think or answer part.

    Dims ``(span, layer, hidden)``; coordinates ``rollout`` (row of ``open_run``), ``turn``, ``part`` (`whole`,
    `think`, `answer`) and ``count`` (tokens averaged). Only committed spans are there. Raises InputError if there
    is no run, or one without such arrays.
    """
    folder = open_folder(url) if isinstance(url, str | Path) else url
    manifest = require_manifest(folder)
    if not manifest.spans_per_rollout:
        raise InputError(f"{folder.url}: the run has no arrays by span; open_run reads what it has.")
    committed = committed_slots(folder)
    opened = _open_group(folder, manifest, committed, spans=True)
    coordinates = {name: opened[name].values for name in SPAN_COORDINATES}
    used = np.flatnonzero(coordinates["part"] != PARTS.index("unused"))
    part = np.array(PARTS, dtype=object)[coordinates.pop("part")[used]]
    placed = {name: ("span", values[used]) for name, values in coordinates.items()}
    selected = opened.isel(span=used).assign_coords({**placed, "part": ("span", part)})
    return selected.assign_attrs(run=folder.url, identity_hash=manifest.identity_hash)


def select(
    run: xr.Dataset,
    *,
    role: str | Sequence[str] | None = None,
    prompt: int | Sequence[int] | None = None,
    question: str | int | Sequence[str | int] | None = None,
    score: float | Sequence[float] | None = None,
    layer: int | Sequence[int] | None = None,
    status: str | None = "ok",
) -> xr.Dataset:
    """The part of a run (of ``open_run``) that matches everything given; one value or several each.

    ``question`` takes ids or indices. ``status`` is `ok` unless said otherwise; None takes every row. Reads nothing
    but the coordinates. Raises InputError for values that the run does not have.
    """
    keep = np.ones(run.sizes["rollout"], dtype=bool)
    if status is not None:
        if status not in STATUS:
            raise InputError(f"status: {status!r}; allowed are {', '.join(STATUS)}, or None for every row.")
        keep &= run["status"].values == STATUS.index(status)
    questions = [] if question is None else _listed(question)
    by_id = any(isinstance(entry, str) for entry in questions)
    for name, wanted in (
        ("role", role),
        ("prompt", prompt),
        ("question_id" if by_id else "question", question),
        ("score", score),
    ):
        if wanted is None:
            continue
        if name not in run.coords:
            raise InputError(
                f"{name}: the run has none. Import or judge first, or name the judge: open_run(scores=...)."
            )
        keep &= np.isin(run[name].values, _known(run, name, _listed(wanted)))
    selected = run.isel(rollout=np.flatnonzero(keep))
    return selected if layer is None else selected.sel(layer=_known(run, "layer", _listed(layer)))


def _open_group(folder: Folder, manifest: Manifest, committed: dict[Slot, int], *, spans: bool) -> xr.Dataset:
    """Arrays of one kind, chunked along the shards; coordinates only where the plan does not know them."""
    layout = manifest.layout.of_spans(manifest.spans_per_rollout) if spans else manifest.layout
    rows = "span" if spans else "rollout"
    opened = xr.open_zarr(
        CommittedStore(folder, committed),
        group=SPANS if spans else None,
        chunks={rows: layout.unit_rows, "layer": layout.layer_group, "hidden": layout.hidden},
        drop_variables=[] if spans else list(COORDINATES),
        consolidated=not spans,
    )
    # The group's metadata may already describe a longer axis than the manifest that was read.
    trimmed: xr.Dataset = opened.isel({rows: slice(0, layout.padded_rows)})
    return trimmed


def _attributes(folder: Folder, manifest: Manifest, committed: dict[Slot, int], status: Any) -> dict[str, Any]:
    """What a notebook shows below the arrays."""
    layout = manifest.layout
    counts = Counter(STATUS[code] for code in status.tolist())
    pending = layout.rows - counts["ok"] - counts["dropped"]
    attributes = {
        "run": folder.url,
        "model": manifest.identity["model"]["name"],
        "identity_hash": manifest.identity_hash,
        "rollouts": f"{layout.rows} planned: {counts['ok']} ok, {counts['dropped']} dropped, {pending} pending",
        "precision": f"{manifest.identity['store']['precision']} mantissa bits",
        "scores": ", ".join(judges(committed)) or "none",
        "frozen": manifest.frozen["content_hash"] if manifest.frozen else "no",
    }
    for spec in manifest.arrays:
        attributes[spec.name] = f"{_complete_layers(spec, layout, committed)} of {layout.layers} layers complete"
    return attributes


def _complete_layers(spec: ArraySpec, layout: Any, committed: dict[Slot, int]) -> int:
    units = Counter(group for array, _, group in committed if array == spec.record)
    return sum(len(layout.group_layers(group)) for group, count in units.items() if count == layout.units)


def stored_layers(folder: Folder, manifest: Manifest, spec: ArraySpec) -> list[int]:
    """Layers of an array that every rollout with coordinates has. Fewer than asked for while layers are added."""
    committed = committed_slots(folder)
    units = [unit for array, unit, _ in committed if array == COORDINATES_RECORD]
    return [
        layer
        for group in spec.wanted_groups(manifest.layout)
        if all((spec.record, unit, group) in committed for unit in units)
        for layer in manifest.layout.group_layers(group)
    ]


def _listed(wanted: Any) -> list[Any]:
    return [wanted] if isinstance(wanted, str | int | float | np.generic) else list(wanted)


def _known(run: xr.Dataset, name: str, wanted: list[Any]) -> list[Any]:
    known = set(run[name].values.tolist())
    unknown = [value for value in wanted if value not in known]
    if unknown:
        shown = sorted(value for value in known if value == value and value != "")[:50]
        raise InputError(f"{name}: {unknown[0]!r} is not in this run. It has {', '.join(map(str, shown))}.")
    return wanted
