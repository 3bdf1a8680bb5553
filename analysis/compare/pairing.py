"""Which role and which layer of one fitted run stand beside which of another."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from personaspace.store.errors import InputError
from personaspace.store.layout import ranges

LEAST_ROLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A run with its fit, as a comparison sees it."""

    name: str
    """What the comparison calls it; no two runs share a name."""
    space: xr.Dataset
    """The fit, as ``open_space`` gives it; may be lazy."""
    depth: int
    """Layers that the model has, stored or not."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The identity of its manifest: model, generation, extraction."""

    @property
    def target(self) -> int:
        """The layer that its report opens with."""
        return int(self.space.attrs["target_layer"])

    def relative(self, layer: int) -> float:
        """Where a layer lies in the model: 0 is the first, 1 the last."""
        return layer / max(1, self.depth - 1)


def common_roles(a: Fitted, b: Fitted) -> list[str]:
    """Roles that both axes rest on, in the order of the first. Raises InputError if they are fewer than three.

    Where a judge's scores split a role, that is the part that fully plays it; the other is not counted twice.
    """
    theirs = set(_axis_roles(b.space))
    common = [role for role in _axis_roles(a.space) if role in theirs]
    if len(common) < LEAST_ROLES:
        raise InputError(
            f"compare: {a.name} and {b.name} have {len(common)} roles in common ({', '.join(common) or 'none'}); at "
            f"least {LEAST_ROLES} are needed. Roles are matched by their ids: compare runs of one catalogue."
        )
    return common


def _axis_roles(space: xr.Dataset) -> list[str]:
    levels = space["role_level"].values if "role_level" in space.coords else [""] * space.sizes["role"]
    return [str(role) for role, level in zip(space["role"].values, levels, strict=True) if level != "somewhat"]


def layer_pairs(a: Fitted, b: Fitted) -> list[tuple[int, int]]:
    """Each layer of the first run with the layer of the second at the nearest relative depth.

    Layers whose neighbours the second run has not stored are left out. Raises InputError if that leaves none.
    """
    theirs = [int(layer) for layer in b.space["layer"].values]
    found = []
    for layer in (int(value) for value in a.space["layer"].values):
        distance, nearest = min((abs(b.relative(other) - a.relative(layer)), other) for other in theirs)
        if distance <= 0.5 / max(1, min(a.depth, b.depth) - 1) + 1e-9:
            found.append((layer, nearest))
    if not found:
        ours = ranges([int(layer) for layer in a.space["layer"].values])
        raise InputError(
            f"compare: {a.name} has layers {ours} of {a.depth} and {b.name} {ranges(theirs)} of {b.depth}: none "
            "at like depths. Grow one of the runs by layers: `extract.layers`."
        )
    return found
