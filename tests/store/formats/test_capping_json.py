"""Capping configs as JSON: bit for bit both ways, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.store.errors import InputError
from personaspace.store.formats.capping_json import read_capping_json, write_capping_json
from personaspace.store.formats.directions import CappingConfig, CapVector
from tests.store.formats.samples import values

VECTOR = {"layer": 2, "vector": [1.0, 0.5]}
HEAD = {"format": "personaspace-capping", "version": 1}


def test_round_trip(tmp_path: Path) -> None:
    vectors = {"evil": CapVector(layer=3, vector_D=values(64)), "odd": CapVector(layer=0, vector_D=values(64) * 1e-38)}
    config = CappingConfig(vectors=vectors, experiments={"a": (("odd", -1.5), ("evil", 1 / 3)), "b": ()})
    write_capping_json(tmp_path / "caps.json", config)
    found = read_capping_json(tmp_path / "caps.json")
    assert found.experiments == config.experiments
    assert list(found.vectors) == ["evil", "odd"]
    for name, vector in vectors.items():
        assert found.vectors[name].layer == vector.layer
        assert found.vectors[name].vector_D.tobytes() == vector.vector_D.tobytes()
    with pytest.raises(InputError, match="exists already"):
        write_capping_json(tmp_path / "caps.json", config)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], 'is no capping config; expected {"format": "personaspace-capping", "version": 1, ...}.'),
        (HEAD | {"version": 2}, "is no capping config"),
        (HEAD, "needs an object `vectors` and a list `experiments`."),
        (HEAD | {"vectors": {}, "experiments": [{}]}, 'experiments[0]: expected {"id": text'),
        (
            HEAD | {"vectors": {}, "experiments": [{"id": "a", "interventions": []}] * 2},
            "experiments[1]: id 'a' is there already",
        ),
        (
            HEAD | {"vectors": {}, "experiments": [{"id": "a", "interventions": [{"vector": "v", "cap": True}]}]},
            "experiments[0]: `interventions` must be a list",
        ),
        (
            HEAD | {"vectors": {}, "experiments": [{"id": "a", "interventions": [{"vector": "v", "cap": 10**400}]}]},
            "experiments[0]: `interventions` must be a list",
        ),
        (
            HEAD | {"vectors": {}, "experiments": [{"id": "a", "interventions": [{"vector": "v", "cap": 1}]}]},
            "Capping experiment 'a': there is no vector 'v'",
        ),
        (HEAD | {"vectors": {"v": {"layer": 1}}, "experiments": []}, "vector 'v': expected {\"layer\": whole number"),
        (HEAD | {"vectors": {"v": VECTOR | {"layer": 1.5}}, "experiments": []}, "vector 'v': Cap: layer is 1.5"),
        (HEAD | {"vectors": {"v": VECTOR | {"vector": []}}, "experiments": []}, "vector 'v': Cap: vector: is float32"),
        (HEAD | {"vectors": {"v": VECTOR | {"vector": ["1"]}}, "experiments": []}, "vector 'v': expected"),
        (HEAD | {"vectors": {"v": VECTOR | {"vector": [1e39]}}, "experiments": []}, "holds values that are not finite"),
        (HEAD | {"vectors": {"v": VECTOR | {"vector": [10**400]}}, "experiments": []}, "vector 'v': expected"),
        (HEAD | {"vectors": {"v": VECTOR | {"vector": [math.nan]}}, "experiments": []}, "holds values that are not"),
    ],
)
def test_refused_files(tmp_path: Path, entry: Any, message: str) -> None:
    file = tmp_path / "caps.json"
    file.write_text(json.dumps(entry))
    with pytest.raises(InputError) as error, np.errstate(all="raise"):
        read_capping_json(file)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
