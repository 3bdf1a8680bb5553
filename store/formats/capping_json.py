"""Capping configs as JSON: what the reference project keeps in a `.pt` file, for people and other programs.

{"format": "personaspace-capping", "version": 1, "vectors": {NAME: {"layer": 17, "vector": [0.5, ...]}},
"experiments": [{"id": ID, "interventions": [{"vector": NAME, "cap": 1.5}]}]}. Numbers read back as the same float32.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import CappingConfig, CapVector
from personaspace.store.formats.files import naming, replacing, require_file
from personaspace.store.formats.json_text import parse_json

FORMAT = "personaspace-capping"
VERSION = 1


def write_capping_json(file: Path, config: CappingConfig, *, overwrite: bool = False) -> None:
    """Writes a capping config, in the order of ``config``."""
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "vectors": {
            name: {"layer": vector.layer, "vector": vector.vector_D.tolist()} for name, vector in config.vectors.items()
        },
        "experiments": [
            {"id": experiment, "interventions": [{"vector": name, "cap": cap} for name, cap in caps]}
            for experiment, caps in config.experiments.items()
        ],
    }
    with replacing(file, overwrite=overwrite) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="ascii")


def read_capping_json(file: Path) -> CappingConfig:
    """A capping config. Raises InputError naming file and entry."""
    entry = parse_json(require_file(file).read_bytes(), f"{file}: not valid JSON")
    if not isinstance(entry, dict) or (entry.get("format"), entry.get("version")) != (FORMAT, VERSION):
        raise InputError(f'{file}: is no capping config; expected {{"format": "{FORMAT}", "version": {VERSION}, ...}}.')
    vectors, experiments = entry.get("vectors"), entry.get("experiments")
    if not isinstance(vectors, dict) or not isinstance(experiments, list):
        raise InputError(f"{file}: needs an object `vectors` and a list `experiments`.")
    found: dict[str, tuple[tuple[str, float], ...]] = {}
    for number, experiment in enumerate(experiments):
        where = f"{file}: experiments[{number}]"
        if not isinstance(experiment, dict) or not isinstance(experiment.get("id"), str):
            raise InputError(f'{where}: expected {{"id": text, "interventions": [...]}}.')
        if experiment["id"] in found:
            raise InputError(f"{where}: id {experiment['id']!r} is there already; ids must be unique.")
        found[experiment["id"]] = _interventions(experiment.get("interventions"), where)
    with naming(file):
        return CappingConfig(
            vectors={name: _vector(vector, f"vector {name!r}") for name, vector in vectors.items()}, experiments=found
        )


def _interventions(entries: Any, where: str) -> tuple[tuple[str, float], ...]:
    if not isinstance(entries, list) or not all(
        isinstance(item, dict) and isinstance(item.get("vector"), str) and _is_number(item.get("cap"))
        for item in entries
    ):
        raise InputError(f'{where}: `interventions` must be a list of {{"vector": name, "cap": number}}.')
    return tuple((item["vector"], float(item["cap"])) for item in entries)


def _vector(entry: Any, where: str) -> CapVector:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("vector"), list)
        or not all(_is_number(value) for value in entry["vector"])
    ):
        raise InputError(f'{where}: expected {{"layer": whole number, "vector": [numbers]}}.')
    with naming(where), np.errstate(over="ignore"):
        return CapVector(layer=entry.get("layer", -1), vector_D=np.array(entry["vector"], dtype=np.float32))


def _is_number(value: Any) -> bool:
    # JSON knows whole numbers beyond any float.
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64)
