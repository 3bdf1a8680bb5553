"""The reference project's `.pt` files: what it writes is read, what is written it can read, and nothing is run."""

import io
import math
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import CappingConfig, CapVector
from personaspace.store.formats.torch_files import (
    RoleVector,
    activation_shapes,
    iter_activations,
    read_axis,
    read_capping,
    read_vector,
    write_activations,
    write_axis,
    write_capping,
    write_vector,
)
from tests.store.formats.samples import values


def test_activations_as_the_project_saves_them(tmp_path: Path) -> None:
    batch = torch.randn(2, 3, 4).to(torch.bfloat16)  # entries are views of a batch, keys in no order
    torch.save({"pos_p1_q0": batch[0], "pos_p0_q5": batch[1]}, tmp_path / "ghost.pt")
    found = dict(iter_activations(tmp_path / "ghost.pt"))
    assert list(found) == ["pos_p1_q0", "pos_p0_q5"]
    for number, act_LD in enumerate(found.values()):
        assert act_LD.dtype == np.float32
        assert act_LD.flags.writeable  # a copy, not the file
        assert (act_LD == batch[number].float().numpy()).all()


def test_activations_of_old_torch(tmp_path: Path) -> None:
    entry = OrderedDict(pos_p0_q0=torch.nn.Parameter(torch.ones(2, 3, dtype=torch.float64)))
    torch.save(entry, tmp_path / "ghost.pt", _use_new_zipfile_serialization=False)
    ((key, act_LD),) = iter_activations(tmp_path / "ghost.pt")
    assert (key, act_LD.tolist()) == ("pos_p0_q0", [[1.0] * 3] * 2)


def test_shapes_without_values(tmp_path: Path) -> None:
    torch.save({"pos_p1_q0": torch.full((2, 3), math.nan), "pos_p0_q5": torch.ones(2, 3)}, tmp_path / "ghost.pt")
    assert activation_shapes(tmp_path / "ghost.pt") == {"pos_p1_q0": (2, 3), "pos_p0_q5": (2, 3)}
    torch.save({"pos_p1_q0": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "ghost.pt")
    with pytest.raises(InputError, match="more values than the file holds"):
        activation_shapes(tmp_path / "ghost.pt")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
@example([3.3895313892515355e38, 1.401298464324817e-45, -0.0, 1.00390625, 1.01171875])
def test_rounding_is_that_of_torch(numbers: list[float]) -> None:
    array = np.array([numbers], dtype=np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16)
    if not expected.isfinite().all():
        return
    with TemporaryDirectory() as folder:
        file = write_activations(Path(folder), "ghost", [("pos_p0_q0", array)])
        stored = torch.load(file, weights_only=True)["pos_p0_q0"]
        assert torch.equal(stored.view(torch.int16), expected.view(torch.int16))
        ((_, again),) = iter_activations(file)
        assert again.tobytes() == expected.float().numpy().tobytes()


def test_written_activations(tmp_path: Path) -> None:
    file = write_activations(tmp_path, "ghost", [("pos_p1_q0", values(3, 4)), ("default_p0_q5", values(3, 4, seed=1))])
    entry = torch.load(file, weights_only=True)
    assert file == tmp_path / "ghost.pt"
    assert list(entry) == ["pos_p1_q0", "default_p0_q5"]
    assert all(value.dtype == torch.bfloat16 and value.shape == (3, 4) for value in entry.values())
    again = dict(iter_activations(write_activations(tmp_path, "again", iter_activations(file))))
    assert all((again[key] == value.float().numpy()).all() for key, value in entry.items())
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["again.pt", "ghost.pt"]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127))
@example(1.00390625)  # halfway: down to the even 1.0
@example(1.01171875)  # halfway: up to the even 1.015625
@example(1e-42)
def test_rounding_is_to_nearest_even(value: float) -> None:
    with TemporaryDirectory() as folder:
        file = write_activations(Path(folder), "a", [("pos_p0_q0", np.array([[value]], np.float32))])
        ((_, act_LD),) = iter_activations(file)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    assert struct.pack("<f", act_LD[0, 0]) == struct.pack("<I", kept)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (torch.ones(2, 3), "holds a tensor (2, 3); expected a dict of tensors by key, such as `pos_p0_q17`."),
        ({}, "holds a dict with keys []; expected a dict of tensors by key"),
        ([torch.ones(2, 3)], "holds a list; expected a dict"),
        ({3: torch.ones(2, 3)}, "key 3 is no text; expected keys such as `pos_p0_q17`."),
        ({"ghost": torch.ones(2, 3)}, "key 'ghost' is not of the form LABEL_pPROMPT_qQUESTION"),
        ({"pos_p0_q0": [1.0]}, "pos_p0_q0: is a list; expected a tensor of 2 dimensions."),
        ({"pos_p0_q0": torch.ones(3)}, "pos_p0_q0: is float32 (3,); it must be a float32 array of 2 dimensions"),
        ({"pos_p0_q0": torch.ones(2, 0)}, "pos_p0_q0: is float32 (2, 0); it must be a float32 array of 2 dimensions"),
        ({"pos_p0_q0": torch.ones(2, 3).int()}, "pos_p0_q0: is torch.int32, torch.strided; expected a dense tensor"),
        ({"pos_p0_q0": torch.eye(2).to_sparse()}, "pos_p0_q0: is torch.float32, torch.sparse_coo; expected a dense"),
        ({"pos_p0_q0": torch.ones(1, 1, device="meta")}, "pos_p0_q0: is torch.float32, torch.strided; expected"),
        ({"pos_p0_q0": torch.full((1, 2), math.nan)}, "pos_p0_q0: holds values that are not finite"),
        ({"pos_p0_q0": torch.full((1, 2), 1e300, dtype=torch.float64)}, "pos_p0_q0: holds values that are not finite"),
        ({"pos_p0_q0": torch.ones(1).expand(10**6, 10**6)}, "pos_p0_q0: is (1000000, 1000000), more values than the"),
        (
            {"pos_p0_q0": torch.ones(2, 3), "pos_p0_q1": torch.ones(3, 3)},
            "pos_p0_q1: is (3, 3), but the first of the file is (2, 3).",
        ),
    ],
)
def test_refused_activations_name_file_and_key(tmp_path: Path, entry: Any, message: str) -> None:
    file = tmp_path / "ghost.pt"
    torch.save(entry, file)
    with pytest.raises(InputError) as error:
        list(iter_activations(file))
    assert str(error.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ([], "there are no activations to write."),
        ([("ghost", values(2, 3))], "key 'ghost' is not of the form"),
        ([("pos_p0_q0", values(2, 3))] * 2, "pos_p0_q0 is given twice; the format has one sample of each"),
        ([("pos_p0_q0", values(3))], "pos_p0_q0: is float32 (3,); it must be a float32 array of 2 dimensions"),
        ([("pos_p0_q0", np.ones((1, 1)))], "pos_p0_q0: is float64 (1, 1); it must be a float32 array"),
        ([("pos_p0_q0", values(2, 3)), ("pos_p0_q1", values(2, 4))], "pos_p0_q1: is (2, 4), but the first of the"),
        ([("pos_p0_q0", np.full((1, 1), 3.4e38, np.float32))], "pos_p0_q0: holds values beyond the range of bfloat16"),
    ],
)
def test_activations_that_can_not_be_written(tmp_path: Path, activations: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        write_activations(tmp_path, "ghost", activations)
    assert str(error.value).startswith(f"{tmp_path / 'ghost.pt'}: {message}")
    assert list(tmp_path.iterdir()) == []


class Malicious:
    """Unpickled by the ordinary means, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


READERS: list[Any] = [read_axis, read_vector, read_capping, lambda file: list(iter_activations(file))]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path: Path, read: Any, zipped: bool) -> None:
    target, file = tmp_path / "ran", tmp_path / "ghost.pt"
    entry = {"axis": Malicious(target), "vector": torch.ones(2, 2)}
    torch.save(entry, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError) as error:
        read(file)
    assert str(error.value) == (
        f"{file}: names `posix.mkdir`, which is no tensor, number or text. It is refused, and nothing of it was run; "
        "have it saved again with tensors and plain values only."
    )
    assert not target.exists()
    pickle.loads(pickle.dumps(entry))  # what would have happened otherwise
    assert target.exists()


@pytest.mark.parametrize("read", READERS)
def test_broken_files(tmp_path: Path, read: Any) -> None:
    file = tmp_path / "ghost.pt"
    sink = io.BytesIO()
    torch.save(torch.ones(40, 40), sink)
    pickled = pickle.dumps(Malicious(tmp_path / "ran"), protocol=2)
    for content in (b"", b"PK\x03\x04", b"axis" * 9, sink.getvalue()[:-200], pickled):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"^{file}: "):
            read(file)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match=r"none\.pt: does not exist; name an existing file\."):
        read(tmp_path / "none.pt")


def test_axis_both_ways(tmp_path: Path) -> None:
    axis_LD = values(3, 4)
    write_axis(tmp_path / "axis.pt", axis_LD)
    assert torch.equal(torch.load(tmp_path / "axis.pt", weights_only=True), torch.from_numpy(axis_LD))
    assert (read_axis(tmp_path / "axis.pt") == axis_LD).all()
    torch.save({"axis": torch.from_numpy(axis_LD), "metadata": {"n": 3}}, tmp_path / "saved.pt")
    assert (read_axis(tmp_path / "saved.pt") == axis_LD).all()
    with pytest.raises(InputError, match=r"axis\.pt: exists already"):
        write_axis(tmp_path / "axis.pt", axis_LD)
    torch.save({"vector": torch.ones(1, 1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"holds a dict with keys \['vector'\]; expected a tensor \(layers, hidden\)"):
        read_axis(tmp_path / "other.pt")


def test_vectors_both_ways(tmp_path: Path) -> None:
    file = write_vector(tmp_path, RoleVector(role="ghost", kind="pos_3", vector_LD=values(3, 4)))
    entry = torch.load(file, weights_only=True)
    assert (entry["type"], entry["role"], entry["vector"].dtype) == ("pos_3", "ghost", torch.float32)
    found = read_vector(file)
    assert (found.role, found.kind, found.vector_LD.tobytes()) == ("ghost", "pos_3", values(3, 4).tobytes())
    torch.save(torch.ones(3, 4, dtype=torch.bfloat16), tmp_path / "poet.pt")  # as the project publishes them
    bare = read_vector(tmp_path / "poet.pt")
    assert (bare.role, bare.kind, bare.vector_LD.tolist()) == ("poet", "unknown", [[1.0] * 4] * 3)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"axis": torch.ones(1, 1)}, "holds a dict with keys ['axis']; expected {\"vector\": tensor"),
        ({"vector": torch.ones(3)}, "vector: is float32 (3,); it must be a float32 array of 2 dimensions"),
        ({"vector": torch.ones(1, 1), "type": 3}, "`type` is a int; expected a text such as `pos_3` or `mean`."),
        ({"vector": torch.ones(1, 1), "role": "../../etc/passwd"}, "role name '../../etc/passwd' can't be a file name"),
        ({"vector": torch.ones(1, 1), "role": 3}, "role name 3 can't be a file name"),
    ],
)
def test_refused_vectors(tmp_path: Path, entry: Any, message: str) -> None:
    torch.save(entry, tmp_path / "ghost.pt")
    with pytest.raises(InputError) as error:
        read_vector(tmp_path / "ghost.pt")
    assert str(error.value).startswith(f"{tmp_path / 'ghost.pt'}: {message}")
    with pytest.raises(InputError, match="can't be a file name"):
        write_vector(tmp_path, RoleVector(role="../ghost", kind="mean", vector_LD=values(1, 1)))


def test_capping_both_ways(tmp_path: Path) -> None:
    config = CappingConfig(
        vectors={"away": CapVector(layer=46, vector_D=values(4)), "b": CapVector(layer=47, vector_D=values(4, seed=1))},
        experiments={"layers_46:48-p0.25": (("away", 1.5), ("b", -0.25)), "one": (("b", 3.0),)},
    )
    write_capping(tmp_path / "caps.pt", config)
    entry = torch.load(tmp_path / "caps.pt", weights_only=True)
    assert [experiment["id"] for experiment in entry["experiments"]] == ["layers_46:48-p0.25", "one"]
    assert entry["experiments"][0]["interventions"][1] == {"vector": "b", "cap": -0.25}
    assert entry["vectors"]["away"]["layer"] == 46
    found = read_capping(tmp_path / "caps.pt")
    assert found.experiments == config.experiments
    assert [(name, vector.layer) for name, vector in found.vectors.items()] == [("away", 46), ("b", 47)]
    assert (found.vectors["b"].vector_D == values(4, seed=1)).all()


VECTOR = {"layer": 2, "vector": torch.ones(4, dtype=torch.bfloat16)}


def test_capping_as_the_project_uses_it(tmp_path: Path) -> None:
    interventions = [{"vector": "v", "cap": torch.tensor(1.5)}, {"vector": "w", "coefficient": 2}]
    entry = {"vectors": {"v": VECTOR}, "experiments": [{"id": "x", "interventions": interventions}], "model": "m"}
    torch.save(entry, tmp_path / "caps.pt")
    (cap,) = read_capping(tmp_path / "caps.pt").caps("x")
    assert (cap.name, cap.layer, cap.cap, cap.vector_D.tolist()) == ("v", 2, 1.5, [1.0] * 4)


@pytest.mark.parametrize(
    ("vectors", "experiments", "message"),
    [
        ([], [], "`vectors` is a list; expected a dict by names."),
        ({3: VECTOR}, [], "`vectors` is a dict with keys [3]; expected a dict by names."),
        ({"v": VECTOR}, {}, "`experiments` is a dict with keys []; expected a list."),
        ({"v": VECTOR}, [3], 'experiments[0]: is a int; expected {"id": text'),
        ({"v": VECTOR}, [{"id": "x"}], "experiments[0] 'x': `interventions` is a NoneType; expected a list of dicts."),
        ({"v": VECTOR}, [{"id": "x", "interventions": []}] * 2, "experiments[1]: id 'x' is there already"),
        (
            {"v": VECTOR},
            [{"id": "x", "interventions": [{"cap": 1.0}]}],
            "experiments[0] 'x': intervention {'cap': 1.0}",
        ),
        ({"v": VECTOR}, [{"id": "x", "interventions": [{"vector": "v", "cap": "1"}]}], "experiments[0] 'x': interven"),
        (
            {"v": VECTOR},
            [{"id": "x", "interventions": [{"vector": "w", "cap": 1}]}],
            "Capping experiment 'x': there is",
        ),
        ({"v": VECTOR}, [{"id": "x", "interventions": [{"vector": "v", "cap": math.inf}]}], "Cap 'v': cap is inf"),
        ({"v": {"layer": 2}}, [], "vector 'v': is a dict with keys ['layer']; expected {\"layer\": whole number"),
        ({"v": VECTOR | {"layer": -1}}, [], "vector 'v': Cap: layer is -1; it must be a block index from 0 up."),
        ({"v": VECTOR | {"vector": torch.ones(1, 4)}}, [], "vector 'v': tensor: is float32 (1, 4); it must be"),
        ({"v": VECTOR | {"vector": torch.zeros(4)}}, [], "vector 'v': Cap: vector is zero; it must point somewhere."),
    ],
)
def test_refused_capping(tmp_path: Path, vectors: Any, experiments: Any, message: str) -> None:
    torch.save({"vectors": vectors, "experiments": experiments}, tmp_path / "caps.pt")
    with pytest.raises(InputError) as error:
        read_capping(tmp_path / "caps.pt")
    assert str(error.value).startswith(f"{tmp_path / 'caps.pt'}: {message}")


def test_refused_capping_file(tmp_path: Path) -> None:
    torch.save({"vectors": {}}, tmp_path / "caps.pt")
    with pytest.raises(InputError, match=r"holds a dict with keys \['vectors'\]; expected a dict with `vectors` and"):
        read_capping(tmp_path / "caps.pt")
