"""Directions and caps: parts that do not fit together are refused, with what was found and what is allowed."""

from typing import Any

import numpy as np
import pytest

from personaspace.store.errors import InputError
from personaspace.store.formats.directions import Cap, CappingConfig, CapVector
from tests.store.formats.samples import directions, values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "`model` is empty"),
        ({"layers": ()}, "layers are (); they must be block indices from 0 up, ascending."),
        ({"layers": (3, 1, 0)}, "layers are (3, 1, 0); they must be block indices"),
        ({"layers": (0, 1, 1)}, "layers are (0, 1, 1); they must be block indices"),
        ({"layers": (-1, 0, 1)}, "layers are (-1, 0, 1); they must be block indices"),
        ({"layers": (0, 1, "3")}, "layers are (0, 1, '3'); they must be block indices"),
        ({"layers": (0, 1)}, "all must be the same, with 2 layers as in `layers`."),
        ({"axis_LD": values(3, 5)}, "(layers, hidden) of the arrays is {'axis': (3, 5), 'default': (3, 4)"),
        ({"axis_LD": values(3, 4).astype(np.float64)}, "axis: is float64 (3, 4); it must be a float32 array of 2"),
        ({"axis_LD": [[1.0]]}, "axis: is a list; it must be a float32 array of 2 dimensions"),
        ({"default_LD": values(4)}, "default: is float32 (4,); it must be a float32 array of 2 dimensions"),
        ({"role_RLD": values(2, 3, 0)}, "roles: is float32 (2, 3, 0); it must be a float32 array of 3 dimensions"),
        ({"axis_LD": np.full((3, 4), np.nan, np.float32)}, "axis: holds values that are not finite"),
        ({"axis_LD": None, "default_LD": None, "role_RLD": None, "roles": ()}, "neither axis, default nor roles"),
        ({"roles": ("poet",)}, "1 role names for 2 role vectors; each needs one."),
        ({"role_RLD": None}, "2 role names for 0 role vectors; each needs one."),
        ({"roles": ("poet", "poet")}, "role names poet are given more than once; names must be unique."),
        ({"roles": ("poet", "../etc")}, "role name '../etc' can't be a file name; use letters, digits"),
        ({"roles": ("poet", "")}, "role name '' can't be a file name"),
        ({"roles": ("poet", "ghost\n")}, "role name 'ghost\\n' can't be a file name"),
        ({"roles": ("poet", ["ghost"])}, "role name ['ghost'] can't be a file name"),
        ({"roles": ("poet", "default")}, "`default` is among the roles; its vector belongs in `default_LD`."),
        ({"counts": (1,)}, "counts are (1,) for 2 roles; give one whole number >= 0 per role, or none."),
        ({"counts": (1, -1)}, "counts are (1, -1) for 2 roles"),
        ({"counts": (1, True)}, "counts are (1, True) for 2 roles"),
        ({"provenance": {"run": 3}}, "`provenance` must map texts to texts."),
    ],
)
def test_refused_directions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        directions(**changes)
    assert str(error.value).startswith("Directions: ")
    assert message in str(error.value)


def test_a_role_by_name() -> None:
    all_parts = directions()
    assert all_parts.role_RLD is not None
    assert (all_parts.role_LD("ghost") == all_parts.role_RLD[1]).all()
    assert all_parts.role_LD("default") is all_parts.default_LD
    assert all_parts.hidden == 4
    with pytest.raises(InputError, match=r"hold no role 'pirate'; they hold poet, ghost\."):
        all_parts.role_LD("pirate")
    with pytest.raises(InputError, match=r"hold no role 'poet'; they hold no roles\."):
        directions(roles=(), role_RLD=None, counts=()).role_LD("poet")


def test_caps_of_an_experiment() -> None:
    vectors = {"away": CapVector(layer=3, vector_D=values(4)), "far": CapVector(layer=5, vector_D=values(4))}
    config = CappingConfig(vectors=vectors, experiments={"one": (("far", 2.5), ("away", -1.0)), "none": ()})
    assert [(cap.name, cap.layer, cap.cap) for cap in config.caps("one")] == [("far", 5, 2.5), ("away", 3, -1.0)]
    assert config.caps("none") == ()
    with pytest.raises(InputError, match=r"holds no experiment 'two'; it holds one, none\."):
        config.caps("two")
    with pytest.raises(InputError, match=r"experiment 'x': there is no vector 'near'; there are away, far\."):
        CappingConfig(vectors=vectors, experiments={"x": (("near", 1.0),)})
    with pytest.raises(InputError, match=r"Cap 'away': cap is nan; it must be a finite number\."):
        CappingConfig(vectors=vectors, experiments={"x": (("away", float("nan")),)})


def test_refused_caps() -> None:
    with pytest.raises(InputError, match=r"Cap: vector is zero; it must point somewhere\."):
        Cap(name="away", layer=3, vector_D=np.zeros(4, np.float32), cap=1.0)
    with pytest.raises(InputError, match=r"Cap: layer is -1; it must be a block index from 0 up\."):
        Cap(name="away", layer=-1, vector_D=values(4), cap=1.0)
    with pytest.raises(InputError, match=r"Cap: vector: is float32 \(2, 2\); it must be a float32 array of 1 dim"):
        Cap(name="away", layer=1, vector_D=values(2, 2), cap=1.0)
