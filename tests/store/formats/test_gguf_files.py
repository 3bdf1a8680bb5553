"""Control vectors: the layer of each, the sign, and files of other kinds."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.gguf_files import read_control_vector, write_control_vector
from tests.store.formats.samples import any_directions, directions, values


def test_what_llama_cpp_and_repeng_find(tmp_path: Path) -> None:
    file, given_directions = tmp_path / "axis.gguf", directions()
    assert given_directions.axis_LD is not None
    written = write_control_vector(file, given_directions, model_hint="llama")
    assert written.layers == (1, 3)  # llama.cpp refuses a file with direction.0
    reader = gguf.GGUFReader(file)
    header = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
        "personaspace.meaning": "towards the Assistant: mean(default) - mean(roles)",
        "personaspace.model": "org/model",
        "personaspace.provenance": '{"run": "runs/demo", "precision": "16"}',
    }
    assert [(tensor.name, tensor.tensor_type.name) for tensor in reader.tensors] == [
        ("direction.1", "F32"),
        ("direction.3", "F32"),
    ]
    assert (reader.tensors[0].data == given_directions.axis_LD[1]).all()  # block 1
    assert (reader.tensors[1].data == given_directions.axis_LD[2]).all()  # block 3, third on the L axis


def llama_cpp(file: Path, layers: int, hidden: int) -> dict[int, np.ndarray[Any, Any]]:
    """The vector that llama.cpp adds to the output of each block: its loader's buffer, then its adapter's tensors."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    last = max(int(name.removeprefix("direction.")) for name in tensors)
    buffer = np.zeros(hidden * last, np.float32)
    for number in range(1, last + 1):  # common_control_vector_load_one
        buffer[hidden * (number - 1) : hidden * number] = tensors.get(f"direction.{number}", 0)
    return {il: buffer[hidden * (il - 1) : hidden * il] for il in range(1, layers) if hidden * il <= len(buffer)}


@given(any_directions())
def test_every_block_gets_its_own_vector(written: Directions) -> None:
    if written.axis_LD is None or written.layers == (0,):
        return
    with TemporaryDirectory() as folder:
        file = Path(folder) / "axis.gguf"
        write_control_vector(file, written, model_hint="llama")
        found = read_control_vector(file)
        applied = llama_cpp(file, 101, written.hidden)
    for vector_D, block in zip(written.axis_LD, written.layers, strict=True):
        if block:
            assert (applied[block] == vector_D).all()
            assert (found.direction_LD[found.layers.index(block)] == vector_D).all()
    assert all(block in written.layers or not vector_D.any() for block, vector_D in applied.items())


def test_a_role_is_the_way_from_the_default(tmp_path: Path) -> None:
    parts = directions()
    assert parts.role_RLD is not None
    assert parts.default_LD is not None
    write_control_vector(tmp_path / "ghost.gguf", parts, model_hint="llama", role="ghost")
    found = read_control_vector(tmp_path / "ghost.gguf")
    assert (found.direction_LD == (parts.role_RLD[1] - parts.default_LD)[1:]).all()
    assert (found.layers, found.model_hint) == ((1, 3), "llama")
    assert found.meaning == "towards the role ghost: its mean - mean(default)"


@pytest.mark.parametrize(
    ("changes", "role", "message"),
    [
        ({"axis_LD": None}, None, "the directions hold no axis; fit the run with the `default` role."),
        ({"default_LD": None}, "ghost", "the directions hold no mean of the default role, from which to steer"),
        ({}, "pirate", "Directions hold no role 'pirate'; they hold poet, ghost."),
        (
            {"layers": (0,), "axis_LD": values(1, 4), "default_LD": None, "role_RLD": values(2, 1, 4)},
            None,
            "only block 0 is given, which control vectors can't steer; give later blocks.",
        ),
    ],
)
def test_what_can_not_be_written(tmp_path: Path, changes: dict[str, Any], role: str | None, message: str) -> None:
    with pytest.raises(InputError) as error:
        write_control_vector(tmp_path / "a.gguf", directions(**changes), model_hint="llama", role=role)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path: Path) -> None:
    write_control_vector(tmp_path / "a.gguf", directions(), model_hint="llama")
    with pytest.raises(InputError, match=r"a\.gguf: exists already"):
        write_control_vector(tmp_path / "a.gguf", directions(), model_hint="llama")
    write_control_vector(tmp_path / "a.gguf", directions(), model_hint="qwen3", overwrite=True)
    assert read_control_vector(tmp_path / "a.gguf").model_hint == "qwen3"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError) as error:
        write_control_vector(tmp_path / "a.gguf", directions(), model_hint="llama")
    assert str(error.value) == (
        f"{tmp_path / 'a.gguf'}: GGUF files need the package `gguf`; run: pip install 'gguf>=0.17'"
    )


def save(file: Path, fill: Callable[[Any], None], architecture: str = "controlvector") -> None:
    writer = gguf.GGUFWriter(file, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_of_repeng(tmp_path: Path) -> None:
    def export(writer: Any) -> None:  # block 0 is possible there, and layers go downward
        writer.add_string("controlvector.model_hint", "mistral")
        writer.add_uint32("controlvector.layer_count", 99)
        for layer in (2, 1, 0):
            writer.add_tensor(f"direction.{layer}", np.full(4, layer, np.float32))

    save(tmp_path / "happy.gguf", export)
    found = read_control_vector(tmp_path / "happy.gguf")
    assert (found.model_hint, found.layers, found.meaning) == ("mistral", (0, 1, 2), "")
    assert found.direction_LD.tolist() == [[layer] * 4 for layer in (0, 1, 2)]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "sizes of the vectors are []; expected vectors, all of the same size."),
        ({"direction.1": values(4), "direction.2": values(5)}, "sizes of the vectors are [4, 5]; expected vectors"),
        ({"direction.1": values(4).astype(np.float16)}, "direction.1 is F16; llama.cpp takes F32 only."),
        ({"direction.1": values(2, 2)}, "direction.1: is float32 (2, 2); it must be a float32 array of 1 dimensions"),
        ({"direction.1": np.full(2, np.nan, np.float32)}, "direction.1: holds values that are not finite"),
        ({"direction.01": values(4)}, "holds a tensor 'direction.01'; expected only direction.1, direction.2"),
        ({"blk.0.attn_q.weight": values(4)}, "holds a tensor 'blk.0.attn_q.weight'; expected only"),
    ],
)
def test_refused_tensors(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    file = tmp_path / "a.gguf"
    save(file, lambda writer: [writer.add_tensor(name, array) for name, array in tensors.items()])
    with pytest.raises(InputError) as error:
        read_control_vector(file)
    assert str(error.value).startswith(f"{file}: {message}")


def test_refused_headers(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    save(file, lambda writer: writer.add_tensor("direction.1", values(4)), architecture="llama")
    with pytest.raises(InputError, match="architecture is 'llama'; expected a file of kind `controlvector`"):
        read_control_vector(file)
    save(file, lambda writer: writer.add_uint32("personaspace.meaning", 3))
    with pytest.raises(InputError, match=r"sizes of the vectors are \[\]"):
        read_control_vector(file)
    with pytest.raises(InputError, match=r"none\.gguf: does not exist"):
        read_control_vector(tmp_path / "none.gguf")


HEADER = b"GGUF" + struct.pack("<I", 3)


def entry(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"a" + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"PK\x03\x04" * 20,
        HEADER + struct.pack("<QQ", 2**62, 0),
        HEADER + struct.pack("<QQ", 0, 2**62),
        HEADER + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63),
        HEADER + struct.pack("<QQ", 0, 1) + entry(9, struct.pack("<IQ", 0, 2**60)),  # an array without end
        HEADER + struct.pack("<QQ", 0, 1) + entry(9, struct.pack("<IQ", 0, 10**6) + bytes(10**6)),  # and a long one
        HEADER + struct.pack("<QQ", 0, 1) + entry(9, struct.pack("<IQ", 9, 1) * 50_000),  # arrays of arrays of ...
        HEADER + struct.pack("<QQ", 1, 0) + entry(1, struct.pack("<QIQ", 2**62, 0, 0)) + bytes(64),
    ],
)
def test_broken_files_end_soon(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{file}: can't be read as GGUF"):
        read_control_vector(file)
