"""Directions for steering, as plain data: what a fit or the reference project offers, and what the files here hold.

Shapes: R roles, L layers, D hidden size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE, check_role_name


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Directions:
    """The axis and the vectors that it was made of. Raises InputError where parts do not fit together."""

    model: str
    """Name of the model that they were measured in, such as `Qwen/Qwen3-32B`."""
    layers: tuple[int, ...]
    """0-based indices of the blocks whose output the L axis stands for, ascending."""
    axis_LD: NDArray[np.float32] | None = None
    """mean(default) - mean(roles), in units of the residual stream: points to the Assistant."""
    default_LD: NDArray[np.float32] | None = None
    """Mean activation of the default role."""
    roles: tuple[str, ...] = ()
    """Names of the roles on the R axis, fit for file names; `default` is not among them."""
    role_RLD: NDArray[np.float32] | None = None
    """Mean activation of each role."""
    counts: tuple[int, ...] = ()
    """Rollouts behind each role's mean; empty: unknown."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Where the numbers come from: run, identity hash, precision, versions, as texts."""

    def __post_init__(self) -> None:
        if not self.model:
            raise InputError("Directions: `model` is empty; name the model that they were measured in.")
        self._check_layers()
        self._check_arrays()
        self._check_roles()
        if not all(isinstance(text, str) for pair in self.provenance.items() for text in pair):
            raise InputError("Directions: `provenance` must map texts to texts.")

    @property
    def hidden(self) -> int:
        """D, the size of the residual stream."""
        arrays = (self.axis_LD, self.default_LD, self.role_RLD)
        return int(next(array.shape[-1] for array in arrays if array is not None))

    def role_LD(self, role: str) -> NDArray[np.float32]:
        """Mean activation of one role or of `default`. Raises InputError for a role that isn't here."""
        if role == DEFAULT_ROLE and self.default_LD is not None:
            return self.default_LD
        if self.role_RLD is None or role not in self.roles:
            raise InputError(f"Directions hold no role {role!r}; they hold {some(self.roles) or 'no roles'}.")
        found_LD: NDArray[np.float32] = self.role_RLD[self.roles.index(role)]
        return found_LD

    def _check_layers(self) -> None:
        fit = all(_is_count(layer) for layer in self.layers) and self.layers == tuple(sorted(set(self.layers)))
        if not self.layers or not fit:
            raise InputError(f"Directions: layers are {self.layers}; they must be block indices from 0 up, ascending.")

    def _check_arrays(self) -> None:
        arrays = {"axis": self.axis_LD, "default": self.default_LD, "roles": self.role_RLD}
        given = {name: array for name, array in arrays.items() if array is not None}
        if not given:
            raise InputError("Directions: neither axis, default nor roles are given; there is nothing to steer with.")
        for name, array in given.items():
            check_array(array, f"Directions: {name}", 3 if name == "roles" else 2)
        sizes = {name: array.shape[-2:] for name, array in given.items()}
        if len(set(sizes.values())) > 1 or next(iter(sizes.values()))[0] != len(self.layers):
            raise InputError(
                f"Directions: (layers, hidden) of the arrays is {sizes}; all must be the same, "
                f"with {len(self.layers)} layers as in `layers`."
            )

    def _check_roles(self) -> None:
        rows = 0 if self.role_RLD is None else len(self.role_RLD)
        if rows != len(self.roles):
            raise InputError(f"Directions: {len(self.roles)} role names for {rows} role vectors; each needs one.")
        for role in self.roles:
            check_role_name(role, "Directions")
        if len(set(self.roles)) < len(self.roles):
            doubles = sorted({role for role in self.roles if self.roles.count(role) > 1})
            raise InputError(f"Directions: role names {some(doubles)} are given more than once; names must be unique.")
        if DEFAULT_ROLE in self.roles:
            raise InputError("Directions: `default` is among the roles; its vector belongs in `default_LD`.")
        if self.counts and (len(self.counts) != rows or not all(_is_count(count) for count in self.counts)):
            raise InputError(
                f"Directions: counts are {self.counts} for {rows} roles; give one whole number >= 0 per role, or none."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CapVector:
    """A direction at one layer, by itself."""

    layer: int
    """0-based index of the block whose output it belongs to."""
    vector_D: NDArray[np.float32]
    """The direction, of any length: only where it points matters."""

    def __post_init__(self) -> None:
        if not _is_count(self.layer):
            raise InputError(f"Cap: layer is {self.layer!r}; it must be a block index from 0 up.")
        check_array(self.vector_D, "Cap: vector", 1)
        if not self.vector_D.any():
            raise InputError("Cap: vector is zero; it must point somewhere.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cap:
    """Removes what lies above ``cap`` along the vector; so the vector points away from the Assistant."""

    name: str
    """Name of the vector in its config."""
    layer: int
    """0-based index of the block whose output is capped."""
    vector_D: NDArray[np.float32]
    """The direction, of any length: whoever applies it divides by its norm."""
    cap: float
    """Highest allowed projection on the unit vector, in units of the residual stream."""

    def __post_init__(self) -> None:
        CapVector(layer=self.layer, vector_D=self.vector_D)
        if not math.isfinite(self.cap):
            raise InputError(f"Cap {self.name!r}: cap is {self.cap}; it must be a finite number.")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CappingConfig:
    """Vectors and named sets of caps on them, as the reference project keeps them in one file."""

    vectors: Mapping[str, CapVector]
    """Vectors by name."""
    experiments: Mapping[str, tuple[tuple[str, float], ...]]
    """Interventions of each experiment, by its id: (name of a vector, cap), in order."""

    def __post_init__(self) -> None:
        for experiment in self.experiments:
            self.caps(experiment)

    def caps(self, experiment: str) -> tuple[Cap, ...]:
        """The caps of one experiment. Raises InputError for an unknown experiment or vector."""
        if experiment not in self.experiments:
            raise InputError(f"Capping config holds no experiment {experiment!r}; it holds {some(self.experiments)}.")
        caps = []
        for name, cap in self.experiments[experiment]:
            if name not in self.vectors:
                raise InputError(
                    f"Capping experiment {experiment!r}: there is no vector {name!r}; there are {some(self.vectors)}."
                )
            vector = self.vectors[name]
            caps.append(Cap(name=name, layer=vector.layer, vector_D=vector.vector_D, cap=cap))
        return tuple(caps)


def check_array(array: Any, where: str, dimensions: int) -> None:
    """Raises InputError unless ``array`` is float32, finite, not empty and of that many dimensions."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != dimensions or not array.size:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise InputError(f"{where}: is {found}; it must be a float32 array of {dimensions} dimensions with values.")
    if not np.isfinite(array).all():
        raise InputError(f"{where}: holds values that are not finite; steering with them would destroy every token.")


def some(names: Any) -> str:
    """The first names of a collection, for messages."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
