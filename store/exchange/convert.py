"""Converting steering files into one another: directions by the type of the file, and capping configs.

Shapes: L layers, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.exchange.export import refuse_bad_place, write_fit
from personaspace.store.exchange.export_runs import write_vectors
from personaspace.store.formats.capping_json import read_capping_json, write_capping_json
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.files import naming, replacing_parts
from personaspace.store.formats.gguf_files import AXIS_MEANING, read_control_vector
from personaspace.store.formats.role_names import DEFAULT_ROLE, role_files
from personaspace.store.formats.role_vectors import read_role_vectors
from personaspace.store.formats.safetensors_files import read_directions

FORMATS = {".safetensors": "safetensors", ".gguf": "gguf", ".parquet": "parquet"}
AXIS = "mean(default) - mean of the roles of this file"


def convert_directions(
    source: Path,
    destination: Path,
    *,
    model: str | None = None,
    role: str | None = None,
    model_hint: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Convert by the endings of the two names.

    From: the reference's `vectors` folder (or the folder that holds it, and axis.pt) or axis `.pt`, `.safetensors`,
    `.gguf`, `.parquet`. To: `.safetensors`, `.gguf`, `.parquet`, `.pt` (the axis), or a folder (vectors/ and axis.pt).
    Between `.pt` and `.json`: a capping config. ``model`` names the model where the source does not. ``role``: for
    GGUF, the way to this role in place of the axis. Raises InputError for what the source or the format lacks.
    """
    if source.resolve() == destination.resolve():
        raise InputError(f"{destination}: is the source; choose another destination.")
    refuse_bad_place(destination)
    if {source.suffix, destination.suffix} == {".pt", ".json"}:
        _convert_capping(source, destination, overwrite=overwrite)
    else:
        found = read_any(source, model=model)
        _write(destination, found, role=role, model_hint=model_hint, overwrite=overwrite)
    say(f"{destination}: written")


def read_any(source: Path, *, model: str | None = None) -> Directions:
    """Directions from a file or folder of any of the formats; the axis, where it is not there, from the vectors."""
    if source.is_dir():
        found = _read_folder(source, _named(source, model))
    elif source.suffix == ".pt":
        from personaspace.store.formats.torch_files import read_axis

        found = _of_axis(_named(source, model), read_axis(source), source)
    elif source.suffix == ".gguf":
        found = _read_gguf(source, _named(source, model))
    elif source.suffix in (".safetensors", ".parquet"):
        found = read_directions(source) if source.suffix == ".safetensors" else read_role_vectors(source)
        if model is not None and model != found.model:
            raise InputError(f"{source}: is of the model {found.model!r}, not {model!r}; leave the name out.")
    else:
        raise InputError(
            f"{source}: its kind is not known by its name; give a folder with vectors of the reference project, or a "
            "file .pt, .safetensors, .gguf or .parquet."
        )
    return _with_axis(found)


def _convert_capping(source: Path, destination: Path, *, overwrite: bool) -> None:
    from personaspace.store.formats.torch_files import read_capping, write_capping

    if source.suffix == ".pt":
        write_capping_json(destination, read_capping(source), overwrite=overwrite)
    else:
        write_capping(destination, read_capping_json(source), overwrite=overwrite)


def _write(
    destination: Path, directions: Directions, *, role: str | None, model_hint: str | None, overwrite: bool
) -> None:
    if role is not None and destination.suffix != ".gguf":
        raise InputError(f"{destination}: `role` chooses the direction of a .gguf file; other files hold all roles.")
    if destination.suffix in FORMATS:
        roles, format_ = () if role is None else (role,), FORMATS[destination.suffix]
        write_fit(destination, directions, format_, roles=roles, model_hint=model_hint, overwrite=overwrite)
        return
    if destination.suffix not in ("", ".pt"):
        raise InputError(
            f"{destination}: its kind is not known by its name; use .safetensors, .gguf, .parquet, .pt, or a folder."
        )
    _refuse_gaps(destination, directions.layers)
    if destination.suffix == ".pt":
        from personaspace.store.formats.torch_files import write_axis

        if directions.axis_LD is None:
            raise InputError(f"{destination}: the source holds no axis, and not the vectors that it is made of.")
        write_axis(destination, directions.axis_LD, overwrite=overwrite)
    else:
        with replacing_parts(destination, ("vectors", "axis.pt"), overwrite=overwrite) as temporary:
            write_vectors(temporary, directions)


def _read_folder(source: Path, model: str) -> Directions:
    from personaspace.store.formats.torch_files import read_axis, read_vector

    folder = source / "vectors" if (source / "vectors").is_dir() else source
    vectors = [(file, read_vector(file)) for _, file in role_files(folder, ".pt") if file.name != "axis.pt"]
    shapes = {vector.vector_LD.shape for _, vector in vectors}
    if len(shapes) != 1:
        raise InputError(f"{folder}: shapes of the vectors are {sorted(shapes)}; all must be of one model.")
    by_role: dict[str, NDArray[np.float32]] = {}
    for file, vector in vectors:
        if vector.role in by_role:
            raise InputError(f"{file}: is of role {vector.role!r}, which another file is of, too; remove one of them.")
        by_role[vector.role] = vector.vector_LD
    default_LD = by_role.pop(DEFAULT_ROLE, None)
    axis = folder.parent / "axis.pt" if folder.name == "vectors" else folder / "axis.pt"
    with naming(source):
        return Directions(
            model=model,
            layers=tuple(range(next(iter(shapes))[0])),
            axis_LD=read_axis(axis) if axis.is_file() else None,
            default_LD=default_LD,
            roles=tuple(by_role),
            role_RLD=np.stack(list(by_role.values())) if by_role else None,
            provenance={"source": "assistant-axis vectors"},
        )


def _read_gguf(source: Path, model: str) -> Directions:
    found = read_control_vector(source)
    if found.meaning != AXIS_MEANING:
        raise InputError(
            f"{source}: holds {found.meaning or 'a direction that it does not explain'}; only the Assistant Axis, as "
            "written by personaspace, can be converted."
        )
    with naming(source):
        return Directions(
            model=model,
            layers=found.layers,
            axis_LD=found.direction_LD,
            provenance={"source": "control vector, which has no block 0"},
        )


def _of_axis(model: str, axis_LD: NDArray[np.float32], source: Path) -> Directions:
    with naming(source):
        return Directions(
            model=model,
            layers=tuple(range(len(axis_LD))),
            axis_LD=axis_LD,
            provenance={"source": "assistant-axis axis"},
        )


def _with_axis(found: Directions) -> Directions:
    if found.axis_LD is not None or found.default_LD is None or found.role_RLD is None:
        return found
    axis_LD = (found.default_LD - found.role_RLD.mean(axis=0, dtype=np.float64)).astype(np.float32)
    return replace(found, axis_LD=axis_LD, provenance={**found.provenance, "axis": AXIS})


def _named(source: Path, model: str | None) -> str:
    if not model:
        raise InputError(f"{source}: does not say which model it is of; give its name, such as `Qwen/Qwen3-32B`.")
    return model


def _refuse_gaps(destination: Path, layers: Sequence[int]) -> None:
    if list(layers) != list(range(len(layers))):
        raise InputError(
            f"{destination}: the reference's files number blocks from 0 up, and the source holds {list(layers)[:8]} "
            "and so on; convert to .safetensors, which names its layers."
        )
