"""Directions in safetensors: both files together or nothing, whatever the manifest claims."""

import hashlib
import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from safetensors.numpy import load_file, save_file

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.safetensors_files import read_directions, write_directions
from tests.store.formats.samples import any_directions, directions, same, values


@given(any_directions())
def test_round_trip(written: Directions) -> None:
    with TemporaryDirectory() as folder:
        write_directions(Path(folder) / "fit.safetensors", written)
        assert same(read_directions(Path(folder) / "fit.safetensors"), written)


def test_the_two_files(tmp_path: Path) -> None:
    file = tmp_path / "fit.safetensors"
    strided = np.asfortranarray(values(3, 4))
    assert write_directions(file, directions(axis_LD=strided)) == tmp_path / "fit.json"
    tensors = load_file(file)
    assert {name: (str(array.dtype), array.shape) for name, array in tensors.items()} == {
        "axis": ("float32", (3, 4)),
        "default": ("float32", (3, 4)),
        "roles": ("float32", (2, 3, 4)),
    }
    assert (tensors["axis"] == strided).all()
    assert json.loads((tmp_path / "fit.json").read_text()) == {
        "format": "personaspace-directions",
        "version": 1,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "model": "org/model",
        "layers": [0, 1, 3],
        "roles": ["poet", "ghost"],
        "counts": [12, 0],
        "provenance": {"run": "runs/demo", "precision": "16"},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit.json", "fit.safetensors"]


def test_overwriting(tmp_path: Path) -> None:
    file = tmp_path / "fit.safetensors"
    write_directions(file, directions())
    for kept in ("fit.safetensors", "fit.json"):
        with pytest.raises(InputError, match="exists already"):
            write_directions(file, directions())
        (tmp_path / kept).unlink()
        with pytest.raises(InputError, match="exists already"):
            write_directions(file, directions())
        write_directions(file, directions(model="new"), overwrite=True)
    assert read_directions(file).model == "new"
    with pytest.raises(InputError, match=r"fit\.pt: must end in `\.safetensors`; its manifest gets the same name"):
        write_directions(tmp_path / "fit.pt", directions())


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_directions(tmp_path / "a.safetensors", directions())
    write_directions(tmp_path / "b.safetensors", directions(axis_LD=values(3, 4, seed=9)))
    (tmp_path / "b.safetensors").replace(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"SHA-256 is \w{64}, but a\.json says '\w{64}': the two files do not belong"):
        read_directions(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: does not exist"):
        read_directions(tmp_path / "b.safetensors")
    (tmp_path / "a.json").unlink()
    with pytest.raises(InputError, match=r"a\.json: does not exist"):
        read_directions(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is no manifest of directions"),
        ({"version": 2}, "version is 2; this version of personaspace reads 1."),
        ({"model": None}, "`model` is None; expected a str."),
        ({"layers": 3}, "`layers` is 3; expected a list."),
        ({"provenance": []}, "`provenance` is []; expected a dict."),
        ({"provenance": {"run": 1}}, "Directions: `provenance` must map texts to texts."),
        ({"layers": [0, 1]}, "Directions: (layers, hidden) of the arrays is"),
        ({"layers": [0, 1, [2]]}, "Directions: layers are (0, 1, [2]); they must be block indices"),
        ({"roles": ["poet"]}, "Directions: 1 role names for 2 role vectors"),
        ({"roles": ["poet", "../ghost"]}, "Directions: role name '../ghost' can't be a file name"),
        ({"roles": ["poet", {}]}, "Directions: role name {} can't be a file name"),
        ({"counts": [10**9]}, "Directions: counts are (1000000000,) for 2 roles"),
    ],
)
def test_refused_manifests(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    manifest = write_directions(tmp_path / "fit.safetensors", directions())
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))
    with pytest.raises(InputError) as error:
        read_directions(tmp_path / "fit.safetensors")
    assert str(error.value).startswith(f"{manifest}: {message}")
    manifest.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not valid JSON: nested too deeply"):
        read_directions(tmp_path / "fit.safetensors")


def bare(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can't be read as safetensors"),
        (struct.pack("<Q", 2**62) + b"{}", "can't be read as safetensors"),
        (bare(b'{"axis": {"dtype": "F32", "shape": [9999999, 9999999], "data_offsets": [0, 4]}}', b"1234"), "can't be"),
        (bare(b'{"axis": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}', b"1234"), ""),
        ({"axis": np.ones((3, 4))}, "axis: is float64 (3, 4); it must be a float32 array of 2 dimensions"),
        ({"weights": np.ones((3, 4), np.float32)}, "holds tensors ['weights']; only axis, default, roles are known."),
        ({}, "neither axis, default nor roles are given"),
    ],
)
def test_refused_tensors(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "fit.safetensors"
    manifest = write_directions(file, directions(role_RLD=None, roles=(), counts=()))
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    entry = json.loads(manifest.read_text()) | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(entry))
    with pytest.raises(InputError) as error:
        read_directions(file)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
