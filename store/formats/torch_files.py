"""The `.pt` files of the assistant-axis project, both ways. The only module of store/ that imports torch: import it
inside the function that needs it.

Files are read with ``weights_only=True``: tensors, numbers, texts, dicts and lists. One that names anything else is
refused, and nothing of it is run. What is read is float32; activations are written as bfloat16, as the project does.

Shapes: L layers (as many as the project extracted, from block 0 up unless told otherwise), D hidden size.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.formats.assistant_axis_scores import parse_key
from personaspace.store.formats.directions import CappingConfig, CapVector, check_array
from personaspace.store.formats.files import naming, replacing, require_file
from personaspace.store.formats.role_names import check_role_name


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoleVector:
    """One vector file: the mean activation of a role."""

    role: str
    """Name of the role."""
    kind: str
    """`pos_3` (mean of the responses with score 3), `mean` (of all: the default role) or `unknown`."""
    vector_LD: NDArray[np.float32]
    """The mean, in units of the residual stream."""


def iter_activations(file: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(key, act_LD float32) of every response of one role's file, in its order.

    The file is mapped, not loaded: memory holds one response at a time. Raises InputError naming file and key.
    """
    for key, tensor in _activation_tensors(file):
        yield key, _array(tensor, f"{file}: {key}", 2)


def activation_shapes(file: Path) -> dict[str, tuple[int, int]]:
    """Key -> (layers, hidden) of every response of one role's file, in its order; their values aren't read."""
    return {key: (tensor.shape[0], tensor.shape[1]) for key, tensor in _activation_tensors(file)}


def write_activations(
    folder: Path, role: str, activations: Iterable[tuple[str, NDArray[np.float32]]], *, overwrite: bool = False
) -> Path:
    """Writes FOLDER/ROLE.pt from (key, act_LD float32) pairs, rounded to bfloat16 (to nearest, ties to even).

    Holds the role's rounded activations in memory. Raises InputError for a key that is given twice (the format has no
    place for several samples) or does not fit, and for values beyond bfloat16.
    """
    file = folder / f"{check_role_name(role, str(folder))}.pt"
    rounded: dict[str, torch.Tensor] = {}
    first: tuple[int, ...] | None = None
    with replacing(file, overwrite=overwrite) as temporary:
        for key, act_LD in activations:
            parse_key(key, str(file))
            if key in rounded:
                raise InputError(f"{file}: {key} is given twice; the format has one sample of each, write only one.")
            check_array(act_LD, f"{file}: {key}", 2)
            first = first or act_LD.shape
            if act_LD.shape != first:
                raise InputError(f"{file}: {key}: is {act_LD.shape}, but the first of the file is {first}.")
            rounded[key] = _bfloat16(act_LD, f"{file}: {key}")
        if not rounded:
            raise InputError(f"{file}: there are no activations to write.")
        _save(rounded, temporary)
    return file


def read_vector(file: Path) -> RoleVector:
    """A role's vector: `{"vector", "type", "role"}`, or a bare tensor, whose role is the name of the file."""
    entry = _load(file)
    if isinstance(entry, torch.Tensor):
        entry = {"vector": entry}
    if not isinstance(entry, dict) or "vector" not in entry:
        raise InputError(f'{file}: holds {_kind(entry)}; expected {{"vector": tensor, "type": text, "role": text}}.')
    kind = entry.get("type", "unknown")
    if not isinstance(kind, str):
        raise InputError(f"{file}: `type` is {_kind(kind)}; expected a text such as `pos_3` or `mean`.")
    return RoleVector(
        role=check_role_name(entry.get("role", file.stem), str(file)),
        kind=kind,
        vector_LD=_array(entry["vector"], f"{file}: vector", 2),
    )


def write_vector(folder: Path, vector: RoleVector, *, overwrite: bool = False) -> Path:
    """Writes FOLDER/ROLE.pt in float32. The project tells the default role by `default` in its name, or kind `mean`."""
    file = folder / f"{check_role_name(vector.role, str(folder))}.pt"
    check_array(vector.vector_LD, f"{file}: vector", 2)
    with replacing(file, overwrite=overwrite) as temporary:
        _save({"vector": _tensor(vector.vector_LD), "type": vector.kind, "role": vector.role}, temporary)
    return file


def read_axis(file: Path) -> NDArray[np.float32]:
    """axis_LD: mean(default) - mean(roles), from a bare tensor or `{"axis": tensor}`."""
    entry = _load(file)
    if isinstance(entry, dict) and "axis" in entry:
        entry = entry["axis"]
    if not isinstance(entry, torch.Tensor):
        raise InputError(f'{file}: holds {_kind(entry)}; expected a tensor (layers, hidden) or {{"axis": tensor}}.')
    return _array(entry, f"{file}: axis", 2)


def write_axis(file: Path, axis_LD: NDArray[np.float32], *, overwrite: bool = False) -> None:
    """Writes a bare float32 tensor."""
    check_array(axis_LD, f"{file}: axis", 2)
    with replacing(file, overwrite=overwrite) as temporary:
        _save(_tensor(axis_LD), temporary)


def is_capping(file: Path) -> bool:
    """Whether the file holds a capping config; anything else may be an axis."""
    return _holds_capping(_load(file))


def read_capping(file: Path) -> CappingConfig:
    """A capping config. Interventions without `cap` are left out, as the project itself passes over them."""
    entry = _load(file)
    if not _holds_capping(entry):
        raise InputError(f"{file}: holds {_kind(entry)}; expected a dict with `vectors` and `experiments`.")
    vectors, experiments = entry["vectors"], entry["experiments"]
    if not isinstance(vectors, dict) or not all(isinstance(name, str) for name in vectors):
        raise InputError(f"{file}: `vectors` is {_kind(vectors)}; expected a dict by names.")
    if not isinstance(experiments, list):
        raise InputError(f"{file}: `experiments` is {_kind(experiments)}; expected a list.")
    found: dict[str, tuple[tuple[str, float], ...]] = {}
    for number, experiment in enumerate(experiments):
        where = f"{file}: experiments[{number}]"
        if not isinstance(experiment, dict) or not isinstance(experiment.get("id"), str):
            raise InputError(f'{where}: is {_kind(experiment)}; expected {{"id": text, "interventions": [...]}}.')
        if experiment["id"] in found:
            raise InputError(f"{where}: id {experiment['id']!r} is there already; ids must be unique.")
        found[experiment["id"]] = _interventions(experiment.get("interventions"), f"{where} {experiment['id']!r}")
    with naming(file):
        return CappingConfig(
            vectors={name: _cap_vector(vector, f"vector {name!r}") for name, vector in vectors.items()},
            experiments=found,
        )


def write_capping(file: Path, config: CappingConfig, *, overwrite: bool = False) -> None:
    """Writes a capping config, vectors in float32, in the order of ``config``."""
    vectors = {name: {"layer": cap.layer, "vector": _tensor(cap.vector_D)} for name, cap in config.vectors.items()}
    experiments = [
        {"id": experiment, "interventions": [{"vector": name, "cap": float(cap)} for name, cap in caps]}
        for experiment, caps in config.experiments.items()
    ]
    with replacing(file, overwrite=overwrite) as temporary:
        _save({"vectors": vectors, "experiments": experiments}, temporary)


def _holds_capping(entry: Any) -> bool:
    return isinstance(entry, dict) and {"vectors", "experiments"} <= entry.keys()


def _activation_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Checked keys and tensors of one role's file, all of one shape."""
    entry = _load(file)
    if not isinstance(entry, dict) or not entry:
        raise InputError(f"{file}: holds {_kind(entry)}; expected a dict of tensors by key, such as `pos_p0_q17`.")
    first: torch.Size | None = None
    for key, value in entry.items():
        if not isinstance(key, str):
            raise InputError(f"{file}: key {key!r} is no text; expected keys such as `pos_p0_q17`.")
        parse_key(key, str(file))
        tensor = _check_tensor(value, f"{file}: {key}", 2)
        first = first or tensor.shape
        if tensor.shape != first:
            raise InputError(f"{file}: {key}: is {tuple(tensor.shape)}, but the first of the file is {tuple(first)}.")
        yield key, tensor


def _interventions(entries: Any, where: str) -> tuple[tuple[str, float], ...]:
    if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise InputError(f"{where}: `interventions` is {_kind(entries)}; expected a list of dicts.")
    caps = []
    for item in (item for item in entries if "cap" in item):
        cap = item["cap"]
        if isinstance(cap, torch.Tensor) and cap.numel() == 1:
            cap = cap.item()
        if not isinstance(item.get("vector"), str) or isinstance(cap, bool) or not isinstance(cap, int | float):
            raise InputError(f'{where}: intervention {item!r}; expected {{"vector": name, "cap": number}}.')
        caps.append((item["vector"], float(cap)))
    return tuple(caps)


def _cap_vector(entry: Any, where: str) -> CapVector:
    if not isinstance(entry, dict) or not {"layer", "vector"} <= entry.keys():
        raise InputError(f'{where}: is {_kind(entry)}; expected {{"layer": whole number, "vector": tensor}}.')
    with naming(where):
        return CapVector(layer=entry["layer"], vector_D=_array(entry["vector"], "tensor", 1))


def _load(file: Path) -> Any:
    """The content of a `.pt` file, mapped where its format allows; nothing in it is run."""
    mapped = zipfile.is_zipfile(require_file(file))
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which would run what the file says.
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(
            f"{file}: {f'names `{named[1]}`, which' if named else 'holds what'} is no tensor, number or text. It is "
            "refused, and nothing of it was run; have it saved again with tensors and plain values only."
        ) from error
    except Exception as error:  # a broken file fails in as many ways as there are readers inside torch
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file}: can't be read as a `.pt` file ({type(error).__name__}: {reason}).") from error


def _array(value: Any, where: str, dimensions: int) -> NDArray[np.float32]:
    """A tensor as float32. Raises InputError for other objects, types, shapes and layouts."""
    tensor = _check_tensor(value, where, dimensions)
    array = _float32(tensor.detach().contiguous())
    check_array(array, where, dimensions)
    return array


def _float32(tensor: torch.Tensor) -> NDArray[np.float32]:
    """A copy of the values."""
    if tensor.dtype == torch.bfloat16:
        # Small tensors by the thousand: NumPy does not wake a pool of threads for each, which is 100 times slower.
        bits = tensor.view(torch.int16).numpy().view(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)
    array: NDArray[np.float32] = tensor.to(torch.float32, copy=True).numpy()
    return array


def _bfloat16(array: NDArray[np.float32], where: str) -> torch.Tensor:
    """Finite values, rounded to nearest, ties to even. Raises InputError for values beyond its range."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise InputError(f"{where}: holds values beyond the range of bfloat16 (3.39e38).")
    return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)


def _check_tensor(value: Any, where: str, dimensions: int) -> torch.Tensor:
    """A dense tensor of floats of that many dimensions, its values unread. Raises InputError for anything else."""
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{where}: is {_kind(value)}; expected a tensor of {dimensions} dimensions.")
    if value.layout != torch.strided or value.device.type != "cpu" or not value.is_floating_point():
        raise InputError(f"{where}: is {value.dtype}, {value.layout}; expected a dense tensor of floats.")
    if value.ndim != dimensions or not value.numel():
        # In the words of `check_array`, which sees what was read as float32.
        found = f"float32 {tuple(value.shape)}"
        raise InputError(f"{where}: is {found}; it must be a float32 array of {dimensions} dimensions with values.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        # Strides of zero let a file of some bytes stand for terabytes.
        raise InputError(f"{where}: is {tuple(value.shape)}, more values than the file holds; save it contiguous.")
    return value


def _tensor(array: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _save(entry: Any, file: Path) -> None:
    with file.open("wb") as out:  # through a handle: torch would write the temporary name into the file
        torch.save(entry, out)


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with keys {list(value)[:8]}"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
