"""Reading a run: a lazy xarray Dataset in which only committed data is visible."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
import zarr
from dask.base import tokenize

from personaspace.store.committed import CommittedStore
from personaspace.store.errors import InputError
from personaspace.store.index import read_index
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.plan import read_plan_table
from personaspace.store.records import COORDINATES_RECORD, Slot, committed_slots
from personaspace.store.schema import PARTS, SPAN_COORDINATES, SPANS, STATUS, ArraySpec
from personaspace.store.scores import all_judges, read_scores
from personaspace.store.shards import NOT_COMMITTED, CommittedShards, SelectedShards

SHARDS = "shards"
"""Where an array's encoding keeps what reads it."""
CHUNK_BYTES = 8_000_000
"""Of a Dask chunk of what `select` gives, unless a single shard has more: for less, Dask takes longer than reading."""


def open_run(url: Location, *, scores: str | None = None) -> xr.Dataset:
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
    folder = open_folder(url)
    manifest = require_manifest(folder)
    committed = committed_slots(folder)
    plan = read_plan_table(folder, manifest)
    rows = plan["row"].to_numpy()
    role_ids = np.array([role["id"] for role in manifest.tables["roles"]], dtype=object)
    question_ids = np.array([question["id"] for question in manifest.tables["questions"]], dtype=object)

    def planned(values: Any, padding: Any, dtype: Any) -> xr.Variable:
        column = np.full(manifest.layout.padded_rows, padding, dtype=dtype)
        column[rows] = values
        return xr.Variable("rollout", column)

    coordinates: dict[str, Any] = {
        "rollout_id": planned(plan["rollout_id"].to_numpy(), "", object),
        "role": planned(role_ids[plan["role_id"].to_numpy()], "", object),
        "question_id": planned(question_ids[plan["question"].to_numpy()], "", object),
    }
    for name in ("role_id", "prompt", "question", "sample"):
        coordinates[name] = planned(plan[name].to_numpy(), -1, np.int32)
    for name, column in read_index(folder, manifest, committed).items():
        coordinates[name] = xr.Variable("rollout", column)
    score = read_scores(folder, manifest.layout, committed, scores)
    if score is not None:
        coordinates["score"] = xr.Variable("rollout", score)
    arrays = _arrays(folder, manifest, committed, spans=False)
    attributes = _attributes(folder, manifest, committed, coordinates["status"].values)
    return xr.Dataset(arrays, {**coordinates, "layer": np.arange(manifest.layout.layers, dtype=np.int32)}, attributes)


def open_spans(url: Location) -> xr.Dataset:
    """Open a run's arrays with a row for each span: an assistant turn, or its think or answer part.

    Dims ``(span, layer, hidden)``; coordinates ``rollout`` (row of ``open_run``), ``turn``, ``part`` (`whole`,
    `think`, `answer`) and ``count`` (tokens averaged). Only committed spans are there. Raises InputError if there
    is no run, or one without such arrays.
    """
    folder = open_folder(url)
    manifest = require_manifest(folder)
    if not manifest.spans_per_rollout:
        raise InputError(f"{folder.url}: the run has no arrays by span; open_run reads what it has.")
    committed = committed_slots(folder)
    group = zarr.open_group(CommittedStore(folder, committed), path=SPANS, mode="r")
    places = manifest.layout.padded_rows * manifest.spans_per_rollout
    columns = {name: np.asarray(group[name][:places]) for name in SPAN_COORDINATES}  # type: ignore[index]
    used = np.flatnonzero(columns["part"] != PARTS.index("unused"))
    columns["part"] = np.array(PARTS, dtype=object)[columns["part"]]
    opened = xr.Dataset(
        _arrays(folder, manifest, committed, spans=True),
        {name: ("span", column) for name, column in columns.items()}
        | {"layer": np.arange(manifest.layout.layers, dtype=np.int32)},
        {"run": folder.url, "identity_hash": manifest.identity_hash},
    )
    return opened.isel(span=used)


def select(
    run: xr.Dataset,
    *,
    role: str | Sequence[str] | None = None,
    prompt: int | Sequence[int] | None = None,
    question: str | int | Sequence[str | int] | None = None,
    score: float | Sequence[float] | None = None,
    layer: int | Sequence[int] | None = None,
    status: str | None = "ok",
    without: str | Sequence[str] = (),
) -> xr.Dataset:
    """The part of a run (of ``open_run``) that matches everything given; one value or several each.

    ``question`` takes ids or indices. ``status`` is `ok` unless said otherwise; None takes every row. ``without``
    leaves out the rows for which a boolean coordinate holds, such as `looping` of ``analysis.quality``'s
    ``with_flaws``. Reads nothing but the coordinates. Raises InputError for values that the run does not have.
    """
    keep = np.ones(run.sizes["rollout"], dtype=bool)
    if status is not None:
        if status not in STATUS:
            raise InputError(f"status: {status!r}; allowed are {', '.join(STATUS)}, or None for every row.")
        keep &= run["status"].values == STATUS.index(status)
    for flag in _listed(without):
        if flag not in run.coords or run[flag].dtype != bool or run[flag].dims != ("rollout",):
            raise InputError(f"without: the run has no boolean coordinate {flag!r}; with_flaws(run) adds one per flaw.")
        keep &= ~run[flag].values
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
    layers = np.arange(run.sizes["layer"])
    if layer is not None:
        known = run["layer"].values.tolist()
        layers = np.array([known.index(value) for value in _known(run, "layer", _listed(layer))], dtype=np.intp)
    rows = np.flatnonzero(keep)
    direct: dict[Any, xr.Variable] = {}
    for array, variable in run.data_vars.items():
        shards = variable.encoding.get(SHARDS)
        if shards is not None and variable.data.name == _name(shards):
            chosen = SelectedShards(shards, rows, layers)
            direct[array] = xr.Variable(variable.dims, _lazy(chosen, chosen.chunks(CHUNK_BYTES)), variable.attrs)
    selected = run.drop_vars(direct).isel(rollout=rows, layer=layers, missing_dims="ignore")
    return selected.assign(direct)


def _arrays(folder: Folder, manifest: Manifest, committed: dict[Slot, int], *, spans: bool) -> dict[str, xr.Variable]:
    """The arrays with a row for each rollout, or for each span; Dask chunks are shards."""
    layout = manifest.layout.of_spans(manifest.spans_per_rollout) if spans else manifest.layout
    arrays = {}
    for spec in manifest.arrays:
        if bool(spec.spans) != spans:
            continue
        generations = np.full((layout.units, layout.groups), NOT_COMMITTED)
        for (array, unit, group), generation in committed.items():
            if array == spec.record and unit < layout.units:  # The run may have grown since its manifest was read.
                generations[unit, group] = generation
        shards = CommittedShards(folder, spec.path, layout, generations)
        chunks = (layout.unit_rows, layout.layer_group, layout.hidden)
        dims = ("span" if spans else "rollout", "layer", "hidden")
        attributes = {"description": spec.description}
        # `select` goes back to the shards, as long as nobody has changed the array meanwhile.
        arrays[spec.name] = xr.Variable(dims, _lazy(shards, chunks), attributes, {SHARDS: shards})
    return arrays


def _lazy(values: CommittedShards | SelectedShards, chunks: tuple[Any, ...]) -> da.Array:
    return da.from_array(values, chunks=chunks, asarray=False, name=_name(values))


def _name(values: CommittedShards | SelectedShards) -> str:
    """Of the Dask array; whatever is done to the array gives it another."""
    return f"shards-{tokenize(values)}"


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
        "scores": ", ".join(all_judges(committed)) or "none",
        "frozen": manifest.frozen["content_hash"] if manifest.frozen else "no",
    }
    for spec in manifest.arrays:
        complete = spec.complete_layers(layout, committed, range(layout.units))
        attributes[spec.path] = f"{len(complete)} of {layout.layers} layers complete"
    return attributes


def stored_layers(folder: Folder, manifest: Manifest, spec: ArraySpec) -> list[int]:
    """Layers of an array that every rollout with coordinates has. Fewer than asked for while layers are added."""
    committed = committed_slots(folder)
    units = [unit for array, unit, _ in committed if array == COORDINATES_RECORD]
    return spec.complete_layers(manifest.layout, committed, units)


def _listed(wanted: Any) -> list[Any]:
    return [wanted] if isinstance(wanted, str | int | float | np.generic) else list(wanted)


def _known(run: xr.Dataset, name: str, wanted: list[Any]) -> list[Any]:
    known = set(run[name].values.tolist())
    unknown = [value for value in wanted if value not in known]
    if unknown:
        shown = sorted(value for value in known if value == value and value not in ("", -1))[:50]
        raise InputError(f"{name}: {unknown[0]!r} is not in this run. It has {', '.join(map(str, shown))}.")
    return wanted
