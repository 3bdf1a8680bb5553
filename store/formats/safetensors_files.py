"""Directions in one `.safetensors` file, with a JSON manifest of the same name beside it.

NAME.safetensors: float32 tensors `axis` (layers, hidden), `default` (layers, hidden), `roles` (role, layer, hidden),
those that there are. NAME.json says what they belong to, and the SHA-256 of the tensors' file: the two are read
together or not at all. Shapes come from the tensors; the manifest has to agree with them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.files import naming, refuse_existing, replacing, require_file
from personaspace.store.formats.json_text import parse_json

FORMAT = "personaspace-directions"
VERSION = 1
TENSORS = ("axis", "default", "roles")
FIELDS: dict[str, type] = {"model": str, "layers": list, "roles": list, "counts": list, "provenance": dict}


def write_directions(file: Path, directions: Directions, *, overwrite: bool = False) -> Path:
    """Writes NAME.safetensors and NAME.json; returns the latter. Raises InputError if either exists.

    After a crash between the two, the old manifest refuses the new tensors: write again.
    """
    manifest = manifest_of(file)
    refuse_existing(manifest, overwrite=overwrite)
    arrays = zip(TENSORS, (directions.axis_LD, directions.default_LD, directions.role_RLD), strict=True)
    with replacing(file, overwrite=overwrite) as temporary:
        # Its own save_file makes the file readable for its owner only.
        temporary.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays if array is not None}))
        digest = _sha256(temporary)
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": digest,
        "model": directions.model,
        "layers": directions.layers,
        "roles": directions.roles,
        "counts": directions.counts,
        "provenance": dict(directions.provenance),
    }
    with replacing(manifest, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(entry, indent=2) + "\n", encoding="ascii")
    return manifest


def read_directions(file: Path) -> Directions:
    """Directions from NAME.safetensors and its manifest.

    Raises InputError if either is missing or broken, if they do not belong together, and for tensors that do not fit.
    """
    manifest = require_file(manifest_of(file))
    entry = _read_manifest(manifest)
    found = _sha256(require_file(file))
    if entry.get("sha256") != found:
        raise InputError(
            f"{file}: SHA-256 is {found}, but {manifest.name} says {entry.get('sha256')!r}: the two files do not "
            "belong together, or one is damaged; write or copy both again."
        )
    tensors = _tensors(file)
    with naming(manifest):
        return Directions(
            model=entry["model"],
            layers=tuple(entry["layers"]),
            axis_LD=tensors.get("axis"),
            default_LD=tensors.get("default"),
            roles=tuple(entry["roles"]),
            role_RLD=tensors.get("roles"),
            counts=tuple(entry["counts"]),
            provenance=entry["provenance"],
        )


def manifest_of(file: Path) -> Path:
    """NAME.json of NAME.safetensors. Raises InputError for another ending."""
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: must end in `.safetensors`; its manifest gets the same name with `.json`.")
    return file.with_suffix(".json")


def _tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    try:
        tensors: dict[str, NDArray[np.float32]] = load_file(file)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: can't be read as safetensors ({error}).") from error
    unknown = sorted(tensors.keys() - set(TENSORS))
    if unknown:
        raise InputError(f"{file}: holds tensors {unknown}; only {', '.join(TENSORS)} are known.")
    return tensors


def _read_manifest(manifest: Path) -> dict[str, Any]:
    entry = parse_json(manifest.read_bytes(), f"{manifest}: not valid JSON")
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise InputError(f'{manifest}: is no manifest of directions; expected {{"format": "{FORMAT}", ...}}.')
    if entry.get("version") != VERSION:
        raise InputError(f"{manifest}: version is {entry.get('version')!r}; this version of personaspace reads 1.")
    for name, kind in FIELDS.items():
        if not isinstance(entry.get(name), kind):
            raise InputError(f"{manifest}: `{name}` is {entry.get(name)!r}; expected a {kind.__name__}.")
    return entry


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()
