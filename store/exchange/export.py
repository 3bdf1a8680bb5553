"""Exporting a run: to the files of the reference project, of steering tools, and of the Hugging Face Hub."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from personaspace.store.errors import InputError
from personaspace.store.exchange.export_runs import choose_rollouts, rollout_tables, write_assistant_axis
from personaspace.store.exchange.export_tables import fit_tables
from personaspace.store.exchange.export_transcripts import write_transcripts
from personaspace.store.formats.directions import Directions, some
from personaspace.store.formats.gguf_files import write_control_vector
from personaspace.store.formats.hf_dataset import DatasetCard, write_dataset
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.formats.role_vectors import write_role_vectors
from personaspace.store.formats.safetensors_files import manifest_of, write_directions
from personaspace.store.formats.tables import write_tables
from personaspace.store.manifest import MANIFEST, Manifest, require_manifest
from personaspace.store.objects import Folder
from personaspace.store.space import open_space, space_objects

EXPORTS: Mapping[str, str] = {
    "assistant-axis": "folder of the reference project: responses, scores, activations, vectors and axis",
    "safetensors": "axis and role vectors of the fit in NAME.safetensors, with a manifest NAME.json",
    "gguf": "control vector for llama.cpp and repeng: the axis, or the way to one role",
    "parquet": "role vectors of the fit, one row per role and layer",
    "dataset": "Hugging Face dataset folder with a card: rollouts, scores and role vectors",
    "tables": "folder of CSV and Parquet tables: what the report draws, by layer, role and trait",
    "transcripts": "folder of conversations of several turns, each a transcript JSON of the reference project",
}


def export(
    folder: Folder,
    destination: Path,
    format: str,  # noqa: A002
    *,
    roles: Sequence[str] = (),
    layers: Sequence[int] = (),
    scores: str | None = None,
    sample: int | None = None,
    model_hint: str | None = None,
    license: str = "other",  # noqa: A002
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write a run, or its fit, to ``destination`` in one of the formats of ``EXPORTS``; whole, or not at all.

    ``roles`` and ``layers``: only these (default: all that is stored; of a fit, the axis remains that of all roles).
    ``scores``: whose, where several judged. ``sample``: only this one; the reference format has a place for one
    response to each prompt and question. ``model_hint``: kind of model for GGUF (default: the model's name).
    Rollouts that are dropped or pending are left out, and counted. Raises InputError for whatever is not there.
    """
    if format not in EXPORTS:
        raise InputError(f"export: {format!r} is not a format; choose one of {', '.join(EXPORTS)}.")
    manifest = require_manifest(folder)
    refuse_bad_place(destination)
    if format == "transcripts":
        write_transcripts(folder, manifest, destination, roles=roles, sample=sample, overwrite=overwrite, say=say)
    elif format == "tables":
        write_tables(destination, fit_tables(_part(folder, open_space(folder), roles, layers)), overwrite=overwrite)
    elif format in ("assistant-axis", "dataset"):
        part = choose_rollouts(folder, roles=roles, sample=sample, scores=scores, say=say)
        directions = None
        if space_objects(folder) is None:
            say(f"{folder.url}: no fit yet, so vectors and axis are left out; run `fit` to have them")
        else:
            directions = directions_of(folder, roles=roles, layers=layers)
        if format == "dataset":
            card = _card(manifest, license)
            write_dataset(
                destination, card=card, rollouts=rollout_tables(part), directions=directions, overwrite=overwrite
            )
        else:
            write_assistant_axis(part, destination, directions, layers=layers, overwrite=overwrite, say=say)
    else:
        directions = directions_of(folder, roles=roles, layers=layers)
        write_fit(destination, directions, format, roles=roles, model_hint=model_hint, overwrite=overwrite)
    say(f"{destination}: written")


def write_fit(
    destination: Path,
    directions: Directions,
    format: str,  # noqa: A002
    *,
    roles: Sequence[str] = (),
    model_hint: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write directions as `safetensors`, `gguf` or `parquet`. A GGUF file holds the axis, or the way to one role."""
    if format == "safetensors":
        write_directions(destination, directions, overwrite=overwrite)
    elif format == "parquet":
        write_role_vectors(destination, directions, overwrite=overwrite)
    else:
        if len(roles) > 1:
            raise InputError(
                f"{destination}: {len(roles)} roles are given; a control vector is one direction: give one role for "
                "the way from the default to it, or none for the axis."
            )
        hint = model_hint or directions.model.rstrip("/").rpartition("/")[2]
        role = roles[0] if roles else None
        if role == DEFAULT_ROLE:
            raise InputError(f"{destination}: there is no way from the default role to itself; give another role.")
        write_control_vector(destination, directions, model_hint=hint, role=role, overwrite=overwrite)


def directions_of(folder: Folder, *, roles: Sequence[str] = (), layers: Sequence[int] = ()) -> Directions:
    """Axis and role vectors of the run's latest fit: all of them, or those of some roles and layers.

    Raises InputError if there is no fit, or if it lacks one of them.
    """
    manifest = require_manifest(folder)
    whole = open_space(folder)
    of_axis = int((whole["role_level"].values != "somewhat").sum()) if "role_level" in whole else whole.sizes["role"]
    space = _part(folder, whole, roles, layers)
    role_RLD = space["role_vector"].values.astype(np.float32)
    return Directions(
        model=str(manifest.identity["model"]["name"]),
        layers=tuple(int(layer) for layer in space["layer"].values),
        axis_LD=space["axis"].values.astype(np.float32),
        default_LD=space["default_vector"].values.astype(np.float32),
        roles=tuple(str(role) for role in space["role"].values),
        role_RLD=role_RLD if len(role_RLD) else None,
        counts=tuple(int(count) for count in space["role_count"].values),
        provenance={
            # Its name alone: where it lies is nobody's business once the file is published.
            "run": folder.name,
            "identity_hash": manifest.identity_hash,
            "precision": f"{manifest.identity['store']['precision']} mantissa bits",
            "fitted": str(space.attrs["fitted"]),
            "default_count": str(space.attrs["default_count"]),
            "axis": f"mean(default) - mean of {of_axis} roles",
            "made_with": _made_with(),
        },
    )


def _part(folder: Folder, space: xr.Dataset, roles: Sequence[str], layers: Sequence[int]) -> xr.Dataset:
    """The fit of some roles and layers; of all, where none are named. Raises InputError for those it lacks."""
    known_roles, known_layers = space["role"].values.tolist(), space["layer"].values.tolist()
    for name, asked, known in (("role", roles, [*known_roles, DEFAULT_ROLE]), ("layer", layers, known_layers)):
        absent = [value for value in asked if value not in known]
        if absent:
            raise InputError(f"{folder.url}: the fit has no {name} {absent[0]!r}; it has {some(known)}.")
    return space.isel(
        role=[number for number, role in enumerate(known_roles) if not roles or role in roles],
        layer=[number for number, layer in enumerate(known_layers) if not layers or layer in layers],
    )


def refuse_bad_place(destination: Path) -> None:
    """Raise InputError for an export inside a run, or in its place: it would be foreign to it, or damage it."""
    place = destination.absolute()
    for folder in (place, *place.parents):
        if (folder / MANIFEST).exists():
            raise InputError(f"{destination}: lies in the run {folder}; choose another place for the export.")
    if place.suffix == ".safetensors" and manifest_of(place).name == MANIFEST:
        raise InputError(f"{destination}: its manifest would be {MANIFEST}, the name of a run's; choose another name.")


def _card(manifest: Manifest, license: str) -> DatasetCard:  # noqa: A002
    model = manifest.identity["model"]
    known = model["revision"] and not model.get("imported")
    revision = f" at {model['revision']}" if known else ""
    return DatasetCard(
        pretty_name=f"Personas of {str(model['name']).rstrip('/').rpartition('/')[2]}",
        license=license,
        model=f"{model['name']}{revision}",
        identity_hash=manifest.identity_hash,
        precision=f"{manifest.identity['store']['precision']} mantissa bits",
        made_with=_made_with(),
    )


def _made_with() -> str:
    return f"personaspace {importlib.metadata.version('personaspace')}"
