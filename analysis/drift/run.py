"""The conversations of a run in the space of the same run, or of another run of the same model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from personaspace.analysis.drift.trajectories import trajectories
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import SCENARIO
from personaspace.store.layout import ranges
from personaspace.store.location import Location, open_folder
from personaspace.store.manifest import Manifest, identity_diff, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import open_spans, stored_layers
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import ArraySpec
from personaspace.store.space import open_space

SAME = ("files", "dtype", "quantization")
"""What must be alike of two models for one to be read in the other's space."""
ASIDE = ("name", "revision", "attention", "template_hash", "system_policy")
"""What may differ, and is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Talk:
    """A conversation as it was held."""

    row: int
    """Its row of the run."""
    system: str
    """System prompt; empty where there is none."""
    turns: Mapping[int, tuple[str, str]]
    """Turn of the assistant, 0-based -> what the user said before it, and the answer."""
    written_by: str
    """The model that gave the answers."""


def drift_of(run: Location, space_of: Location | None = None, *, layer: int | None = None) -> xr.Dataset:
    """``trajectories`` of a run's conversations, in its own space or that of the run ``space_of``.

    With coordinates of the conversations besides: ``domain`` (or the role), ``scenario``, ``topic``, ``sample`` and
    ``rollout_id``; and attributes: ``run``, ``space``, ``model``, ``target_layer``, ``notes`` (how the runs differ).
    ``layer``: the only one. Raises InputError where run and space don't fit together.
    """
    folder = open_folder(run)
    fitted = folder if space_of is None else open_folder(space_of)
    manifest = require_manifest(folder)
    of_space = manifest if fitted.url == folder.url else require_manifest(fitted)
    space = _open_space(fitted, own=fitted.url == folder.url)
    spec = _turns_array(folder, manifest, str(space.attrs["array"]))
    notes = compare_models(folder, manifest, fitted, of_space)
    stored = stored_layers(folder, manifest, spec)
    if layer is not None and layer not in stored:
        raise InputError(f"--layer: {layer}; {folder.url} has turns of layers {ranges(stored) or '(none yet)'}.")
    spans = open_spans(folder)
    drift = trajectories(spans.sel(layer=stored), space, layers=None if layer is None else [layer])
    target, layers = int(space.attrs["target_layer"]), drift["layer"].values.tolist()
    drift.attrs |= {
        "run": folder.url,
        "space": fitted.url,
        "model": str(manifest.identity["model"]["name"]),
        # Where turns have other layers than the space opens with, the nearest one.
        "target_layer": min(layers, key=lambda known: abs(known - target)),
        "fitted": str(space.attrs.get("fitted", "")),
        "notes": notes,
        "single_turn": len(np.unique(spans["rollout"].values)) - drift.sizes["conversation"],
    }
    return drift.assign_coords(_labels(folder, manifest, drift["conversation"].values.tolist()))


def read_talks(folder: Folder, manifest: Manifest, rows: Sequence[int]) -> dict[int, Talk]:
    """What was said in some conversations: row -> talk."""
    units = sorted({row // manifest.layout.unit_rows for row in rows})
    wanted = set(rows)
    columns = ["row", "messages", "response", "sampling"]
    model = str(manifest.identity["model"]["name"])
    return {
        entry["row"]: _talk(entry, model)
        for entry in read_rollouts(folder, units, columns).to_pylist()
        if entry["row"] in wanted
    }


def compare_models(folder: Folder, manifest: Manifest, fitted: Folder, of_space: Manifest) -> list[str]:
    """Differences of two runs' models that are worth a word. Raises InputError for those that make them two models."""
    ours, theirs = (dict(run.identity["model"]) for run in (manifest, of_space))
    notes = []
    kinds = [name for name in SAME if name in ours or name in theirs]
    if (ours["revision"] is None) != (theirs["revision"] is None) or not (ours["files"] and theirs["files"]):
        # A hub's commit and a folder are hashed differently; an imported run knows no files.
        kinds.remove("files")
        notes.append("the files of the two models can't be compared, since they come from different places")
    differing = identity_diff(*({name: model.get(name) for name in kinds} for model in (theirs, ours)))
    if differing:
        lines = "\n".join(f"  {line}" for line in differing[:8])
        raise InputError(
            f"{folder.url}: was read from another model than the space of {fitted.url}, so its turns don't lie in that "
            f"space. Space -> conversations:\n{lines}\nName a run of the same model with --space."
        )
    return notes + identity_diff(*({name: model.get(name) for name in ASIDE} for model in (theirs, ours)))


def _open_space(fitted: Folder, *, own: bool) -> xr.Dataset:
    try:
        return open_space(fitted)
    except InputError as error:
        if not own:
            raise
        raise InputError(
            f"{fitted.url}: the run has no fitted space of its own. Name a run of the same model that has one: --space "
            "RUN (with roles in this run, too, `personaspace fit` makes one)."
        ) from error


def _turns_array(folder: Folder, manifest: Manifest, array: str) -> ArraySpec:
    specs = {spec.name: spec for spec in manifest.arrays if "whole" in spec.spans}
    if not specs:
        raise InputError(
            f"{folder.url}: the run has no averages of turns. Extract them: `personaspace extract CONFIG "
            "--extract.reductions mean turns --store.grow`."
        )
    if array not in specs:
        raise InputError(
            f"{folder.url}: has turns of {', '.join(specs)}, and the space was fitted to {array}. A turn is a mean "
            "over its tokens at one site: fit the space to such an array (`personaspace fit RUN --analysis.array "
            f"{next(iter(specs))}`)."
        )
    return specs[array]


def _labels(folder: Folder, manifest: Manifest, rows: list[int]) -> dict[str, Any]:
    """Coordinates of the conversations."""
    roles: list[Any] = list(manifest.tables["roles"])
    questions: list[Any] = list(manifest.tables["questions"])
    units = sorted({row // manifest.layout.unit_rows for row in rows})
    columns = ["row", "rollout_id", "role_id", "question", "sample"]
    entries = {entry["row"]: entry for entry in read_rollouts(folder, units, columns).to_pylist()}
    chosen = [entries[row] for row in rows]
    asked = [questions[entry["question"]] for entry in chosen]
    texts = {
        "domain": [str(roles[entry["role_id"]]["id"]).removeprefix(f"{SCENARIO}.") for entry in chosen],
        "scenario": [str(question["id"]) for question in asked],
        "topic": [str(question["text"]) for question in asked],
        "rollout_id": [entry["rollout_id"] for entry in chosen],
    }
    labels: dict[str, Any] = {name: ("conversation", np.array(of, dtype=object)) for name, of in texts.items()}
    return labels | {"sample": ("conversation", np.array([entry["sample"] for entry in chosen], dtype=np.int32))}


def _talk(entry: Mapping[str, Any], model: str) -> Talk:
    messages = [*entry["messages"], {"role": "assistant", "content": entry["response"]}]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns: dict[int, tuple[str, str]] = {}
    said: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            turns[len(turns)] = ("\n\n".join(said), message["content"])
            said = []
        elif message["role"] == "user":
            said.append(message["content"])
    written_by = json.loads(entry["sampling"]).get("written_by") or model
    return Talk(row=entry["row"], system=system, turns=turns, written_by=written_by)
