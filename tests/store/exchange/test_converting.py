"""Steering files of every kind become every other kind that can hold them; the others are refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personaspace.store.errors import InputError
from personaspace.store.exchange.convert import convert_directions, read_any
from personaspace.store.formats.directions import Directions
from personaspace.store.formats.gguf_files import read_control_vector, write_control_vector
from personaspace.store.formats.role_vectors import write_role_vectors
from personaspace.store.formats.safetensors_files import read_directions, write_directions
from tests.store.formats.samples import values

DEFAULT, ROLES = values(3, 4, seed=1), values(2, 3, 4, seed=2)
AXIS = DEFAULT - ROLES.mean(axis=0)


def convert(source: Path, destination: Path, **changes: Any) -> None:
    convert_directions(source, destination, say=lambda _: None, **changes)


def directions(**changes: Any) -> Directions:
    fields: dict[str, Any] = {
        "model": "org/model",
        "layers": (0, 1, 2),
        "axis_LD": AXIS,
        "default_LD": DEFAULT,
        "roles": ("ghost", "poet"),
        "role_RLD": ROLES,
    }
    return Directions(**(fields | changes))


def write_reference(folder: Path, *, axis: bool = True) -> Path:
    """As the reference project writes it."""
    (folder / "vectors").mkdir(parents=True)
    for role, kind, vector in (("default", "mean", DEFAULT), ("ghost", "pos_3", ROLES[0]), ("poet", "pos_3", ROLES[1])):
        entry = {"vector": torch.from_numpy(vector), "type": kind, "role": role}
        torch.save(entry, folder / "vectors" / f"{role}.pt")
    if axis:
        torch.save(torch.from_numpy(AXIS), folder / "axis.pt")
    return folder


def write_all(folder: Path) -> dict[str, Path]:
    """One of each kind of file."""
    write_directions(folder / "d.safetensors", directions())
    write_role_vectors(folder / "d.parquet", directions())
    write_control_vector(folder / "d.gguf", directions(), model_hint="m")
    out = write_reference(folder / "out")
    return {
        "safetensors": folder / "d.safetensors",
        "parquet": folder / "d.parquet",
        "gguf": folder / "d.gguf",
        "axis": out / "axis.pt",
        "vectors": out / "vectors",
        "output": out,
    }


@pytest.mark.parametrize("source", ["safetensors", "parquet", "vectors", "output"])
@pytest.mark.parametrize("target", ["b.safetensors", "b.parquet", "b.gguf", "b.pt", "b"])
def test_from_whole_directions_to_every_kind(tmp_path: Path, source: str, target: str) -> None:
    model = "org/model" if source in ("vectors", "output") else None
    convert(write_all(tmp_path)[source], tmp_path / target, model=model)
    found = read_any(tmp_path / target, model="org/model")
    assert found.model == "org/model"
    assert found.axis_LD is not None
    np.testing.assert_allclose(found.axis_LD, AXIS[1:] if target == "b.gguf" else AXIS, atol=1e-6)
    if target in ("b.gguf", "b.pt"):
        assert found.roles == ()
    else:
        assert found.roles == ("ghost", "poet")
        np.testing.assert_array_equal(found.role_RLD, ROLES)
        np.testing.assert_array_equal(found.default_LD, DEFAULT)


@pytest.mark.parametrize("source", ["axis", "gguf"])
@pytest.mark.parametrize("target", ["b.safetensors", "b.gguf"])
def test_an_axis_alone(tmp_path: Path, source: str, target: str) -> None:
    convert(write_all(tmp_path)[source], tmp_path / target, model="org/model")
    found = read_any(tmp_path / target, model="org/model")
    blocks = [0, 1, 2] if (source, target) == ("axis", "b.safetensors") else [1, 2]
    assert (list(found.layers), found.roles) == (blocks, ())
    np.testing.assert_array_equal(found.axis_LD, AXIS[blocks])


def test_the_axis_follows_from_the_vectors_where_it_is_not_there(tmp_path: Path) -> None:
    found = read_any(write_reference(tmp_path / "out", axis=False), model="m")
    assert found.axis_LD is not None
    np.testing.assert_allclose(found.axis_LD, AXIS, atol=1e-6)
    assert found.provenance["axis"] == "mean(default) - mean of the roles of this file"


def test_the_way_to_a_role(tmp_path: Path) -> None:
    convert(write_reference(tmp_path / "out"), tmp_path / "b.gguf", model="org/model", role="poet", model_hint="llama")
    found = read_control_vector(tmp_path / "b.gguf")
    assert found.model_hint == "llama"
    np.testing.assert_array_equal(found.direction_LD, (ROLES[1] - DEFAULT)[1:])


def test_capping_configs_both_ways(tmp_path: Path) -> None:
    vectors: Any = {"evil": {"layer": 2, "vector": torch.arange(4.0)}}
    experiments = [{"id": "a", "interventions": [{"vector": "evil", "cap": 0.1}]}]
    torch.save({"vectors": vectors, "experiments": experiments}, tmp_path / "caps.pt")
    convert(tmp_path / "caps.pt", tmp_path / "caps.json")
    convert(tmp_path / "caps.json", tmp_path / "again.pt")
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    assert found["experiments"] == experiments
    assert torch.equal(found["vectors"]["evil"]["vector"], vectors["evil"]["vector"])
    assert found["vectors"]["evil"]["layer"] == 2


@pytest.mark.parametrize(
    ("source", "target", "changes", "message"),
    [
        ("axis", "b.safetensors", {}, "axis.pt: does not say which model it is of; give its name"),
        ("vectors", "b.parquet", {}, "vectors: does not say which model it is of; give its name"),
        ("safetensors", "b.pt", {"model": "other"}, "is of the model 'org/model', not 'other'; leave the name out."),
        ("axis", "b.parquet", {"model": "m"}, "the directions hold an axis only"),
        ("gguf", "b.pt", {"model": "m"}, "the reference's files number blocks from 0 up, and the source holds [1, 2]"),
        ("gguf", "b", {"model": "m"}, "the reference's files number blocks from 0 up"),
        ("safetensors", "b.onnx", {}, "b.onnx: its kind is not known by its name"),
        ("safetensors", "b.pt", {"role": "poet"}, "`role` chooses the direction of a .gguf file"),
        ("safetensors", "b.gguf", {"role": "pirate"}, "Directions hold no role 'pirate'"),
        ("safetensors", "d.safetensors", {}, "is the source; choose another destination."),
        ("axis", "b.json", {}, "axis.pt: holds a tensor (3, 4); expected a dict with `vectors` and `experiments`."),
        ("output", "out/axis.pt", {"model": "m"}, "axis.pt: exists already"),
    ],
)
def test_refused_conversions(
    tmp_path: Path, source: str, target: str, changes: Mapping[str, Any], message: str
) -> None:
    sources = write_all(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        convert(sources[source], tmp_path / target, **changes)
    assert message in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_refused_sources(tmp_path: Path) -> None:
    for name, message in {"a.onnx": "its kind is not known by its name", "a.pt": "does not exist"}.items():
        with pytest.raises(InputError, match=message):
            convert(tmp_path / name, tmp_path / "b.safetensors", model="m")
    write_control_vector(tmp_path / "role.gguf", directions(), model_hint="m", role="poet")
    with pytest.raises(InputError, match=r"role\.gguf: holds towards the role poet: .*; only the Assistant Axis"):
        convert(tmp_path / "role.gguf", tmp_path / "b.safetensors", model="m")
    out = write_reference(tmp_path / "out")
    torch.save({"vector": torch.ones(3, 4), "type": "pos_3", "role": "../ghost"}, out / "vectors" / "evil.pt")
    with pytest.raises(InputError, match=r"evil\.pt: role name '\.\./ghost' can't be a file name"):
        convert(out, tmp_path / "b.safetensors", model="m")
    torch.save({"vector": torch.ones(3, 4), "type": "pos_3", "role": "ghost"}, out / "vectors" / "evil.pt")
    with pytest.raises(InputError, match="is of role 'ghost', which another file is of, too"):
        convert(out, tmp_path / "b.safetensors", model="m")
    torch.save(torch.ones(2, 4), out / "vectors" / "evil.pt")
    with pytest.raises(InputError, match=r"shapes of the vectors are \[\(2, 4\), \(3, 4\)\]; all must be of one model"):
        convert(out, tmp_path / "b.safetensors", model="m")


def test_nothing_is_written_into_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    write_directions(tmp_path / "d.safetensors", directions())
    with pytest.raises(InputError, match="lies in the run"):
        convert(tmp_path / "d.safetensors", tmp_path / "run" / "axis.pt")
    assert read_directions(tmp_path / "d.safetensors").roles == ("ghost", "poet")
