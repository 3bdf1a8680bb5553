"""Control vectors for llama.cpp and repeng: GGUF files with float32 tensors `direction.N`.

N is the 0-based index of the block whose output the vector is added to; that is how this project counts layers, so
`direction.N` holds the vector of block N. Sources:

- llama.cpp, `common/common.cpp`, common_control_vector_load_one: `direction.N` goes to place N - 1 of the buffer ("do
  not store data for layer 0 (it's not used)"), and a file with `direction.0` is refused whole.
- llama.cpp, `src/llama-adapter.cpp`, llama_adapter_cvec::apply: the vector of layer `il` comes from place il - 1
  ("there's never a tensor for layer 0"). The two shifts cancel; the models add it to the output of block `il`.
- repeng, `repeng/extract.py`: keys are block indices, measured at `hidden_states[layer + 1]`, the block's output;
  `control.py` adds them to the output of the same block; export_gguf writes `direction.{key}`.

So block 0 can't be steered by llama.cpp, and its vector is left out of what is written here. (llama.cpp's own
cvector-generator names what it measures after block N - 1 `direction.N`: its vectors act one block later.)

Shapes: L layers, D hidden size.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions, check_array
from personaspace.store.formats.files import replacing, require_file

ARCHITECTURE = "controlvector"
AXIS_MEANING = "towards the Assistant: mean(default) - mean(roles)"
_TENSOR = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_MOST_PARTS = 100_000  # of the header; real files have hundreds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ControlVector:
    """What a control-vector file holds: one vector per block, to be added times a strength."""

    model_hint: str
    """Kind of model, such as `llama`; only a hint."""
    layers: tuple[int, ...]
    """0-based indices of the blocks on the L axis, ascending."""
    direction_LD: NDArray[np.float32]
    """What strength 1 adds to the output of each block, in units of the residual stream."""
    meaning: str
    """What a positive strength does, as a sentence; empty if the file does not say."""


def write_control_vector(
    file: Path, directions: Directions, *, model_hint: str, role: str | None = None, overwrite: bool = False
) -> ControlVector:
    """Writes the axis, or the way from the default to ``role``; returns what was written, without block 0.

    ``model_hint`` is the kind of model, such as `llama`. Positive strength steers towards the Assistant (or the role);
    strength 1 is the whole distance between the means. Raises InputError if the vectors for it are missing, if only
    block 0 is there, and without the package `gguf`.
    """
    gguf = _import_gguf(file)
    if role is None:
        vector_LD, meaning = directions.axis_LD, AXIS_MEANING
    else:
        role_LD, default_LD = directions.role_LD(role), directions.default_LD
        vector_LD = None if default_LD is None else role_LD - default_LD
        meaning = f"towards the role {role}: its mean - mean(default)"
    if vector_LD is None:
        wanted = "axis" if role is None else "mean of the default role, from which to steer"
        raise InputError(f"{file}: the directions hold no {wanted}; fit the run with the `default` role.")
    kept = [number for number, layer in enumerate(directions.layers) if layer > 0]
    if not kept:
        raise InputError(f"{file}: only block 0 is given, which control vectors can't steer; give later blocks.")
    written = ControlVector(
        model_hint=model_hint,
        layers=tuple(directions.layers[number] for number in kept),
        direction_LD=vector_LD[kept],
        meaning=meaning,
    )
    check_array(written.direction_LD, str(file), 2)
    with replacing(file, overwrite=overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(kept))
        writer.add_string("personaspace.meaning", meaning)
        writer.add_string("personaspace.model", directions.model)
        writer.add_string("personaspace.provenance", json.dumps(dict(directions.provenance)))
        for layer, vector_D in zip(written.layers, written.direction_LD, strict=True):
            writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector_D))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return written


def read_control_vector(file: Path) -> ControlVector:
    """A control vector by llama.cpp, repeng or this project. `controlvector.layer_count` is not trusted.

    Raises InputError for files that are broken, of another kind, or whose vectors are not float32 of one size.
    """
    reader = _open(_import_gguf(file), require_file(file))
    architecture = _text(reader, "general.architecture", file)
    if architecture != ARCHITECTURE:
        raise InputError(f"{file}: architecture is {architecture!r}; expected a file of kind `{ARCHITECTURE}`.")
    vectors: dict[int, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        name = _TENSOR.fullmatch(tensor.name)
        if not name:
            raise InputError(f"{file}: holds a tensor {tensor.name!r}; expected only direction.1, direction.2 ...")
        if tensor.tensor_type.name != "F32":
            raise InputError(f"{file}: {tensor.name} is {tensor.tensor_type.name}; llama.cpp takes F32 only.")
        vector_D = np.array(tensor.data, dtype=np.float32)
        check_array(vector_D, f"{file}: {tensor.name}", 1)
        vectors[int(name[1])] = vector_D
    sizes = sorted({len(vector_D) for vector_D in vectors.values()})
    if len(sizes) != 1:
        raise InputError(f"{file}: sizes of the vectors are {sizes}; expected vectors, all of the same size.")
    layers = tuple(sorted(vectors))
    return ControlVector(
        model_hint=_text(reader, f"{ARCHITECTURE}.model_hint", file),
        layers=layers,
        direction_LD=np.stack([vectors[layer] for layer in layers]),
        meaning=_text(reader, "personaspace.meaning", file),
    )


def _import_gguf(file: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"{file}: GGUF files need the package `gguf`; run: pip install 'gguf>=0.17'") from error
    return gguf


def _open(gguf: Any, file: Path) -> Any:
    """A reader that stops at the end of the file: gguf's own goes on for as long as the header tells it to."""

    class BoundedReader(gguf.GGUFReader):
        parts_read = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.parts_read += 1
            if self.parts_read > _MOST_PARTS:
                raise ValueError("its header has more parts than a control vector's")
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, before what its header announces")
            return super()._get(offset, dtype, count, override_order)

    try:
        return BoundedReader(file)
    except Exception as error:  # a broken header fails in as many ways as it has fields
        raise InputError(f"{file}: can't be read as GGUF ({type(error).__name__}: {error}).") from error


def _text(reader: Any, key: str, file: Path) -> str:
    """A text of the header; empty if it isn't there."""
    found = reader.get_field(key)
    if found is None:
        return ""
    if not found.types or found.types[0].name != "STRING":
        raise InputError(f"{file}: `{key}` is no text.")
    return bytes(found.parts[-1]).decode("utf-8", errors="replace")
