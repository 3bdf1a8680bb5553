"""Small directions of every kind, and what it means that two are the same."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from personaspace.store.formats.directions import Directions


def values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def directions(**changes: Any) -> Directions:
    """Two roles, blocks 0, 1 and 3, hidden size 4."""
    fields: dict[str, Any] = {
        "model": "org/model",
        "layers": (0, 1, 3),
        "axis_LD": values(3, 4, seed=1),
        "default_LD": values(3, 4, seed=2),
        "roles": ("poet", "ghost"),
        "role_RLD": values(2, 3, 4, seed=3),
        "counts": (12, 0),
        "provenance": {"run": "runs/demo", "precision": "16"},
    }
    return Directions(**(fields | changes))


def same(one: Directions, two: Directions) -> bool:
    """Bit for bit."""
    arrays = [(one.axis_LD, two.axis_LD), (one.default_LD, two.default_LD), (one.role_RLD, two.role_RLD)]
    return (
        (one.model, one.layers, one.roles, one.counts, dict(one.provenance))
        == (two.model, two.layers, two.roles, two.counts, dict(two.provenance))
    ) and all(
        (a is None) == (b is None) and (a is None or b is None or (a.shape == b.shape and a.tobytes() == b.tobytes()))
        for a, b in arrays
    )


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True).filter(lambda name: name != "default")


@st.composite
def any_directions(draw: st.DrawFn, *, vectors: bool = False) -> Directions:
    """Directions of any parts and sizes; with ``vectors``, some beside the axis."""
    layers = sorted(draw(st.sets(st.integers(0, 100), min_size=1, max_size=4)))
    roles = draw(st.lists(names, max_size=3, unique=True))
    hidden = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32))
    default = draw(st.booleans()) or (vectors and not roles)
    axis = draw(st.booleans()) or (not roles and not default)
    known = bool(roles) and draw(st.booleans())
    counts = draw(st.lists(st.integers(0, 2**40), min_size=len(roles), max_size=len(roles))) if known else []
    text = st.text(st.characters(codec="utf-8"), max_size=5)
    return Directions(
        model=draw(text.filter(bool)),
        layers=tuple(layers),
        axis_LD=values(len(layers), hidden, seed=seed) if axis else None,
        default_LD=values(len(layers), hidden, seed=seed + 1) if default else None,
        roles=tuple(roles),
        role_RLD=values(len(roles), len(layers), hidden, seed=seed + 2) if roles else None,
        counts=tuple(counts),
        provenance=draw(st.dictionaries(text, text, max_size=3)),
    )
