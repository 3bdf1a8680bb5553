"""A unit's coordinates as bytes."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from personaspace.store.layout import coordinate_key
from personaspace.store.manifest import Manifest
from personaspace.store.schema import COORDINATES, STATUS, encode_coordinate


class Placed(Protocol):
    """A planned rollout, as far as its coordinates go."""

    @property
    def role_id(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def question(self) -> int: ...
    @property
    def sample(self) -> int: ...


def unit_coordinates(
    manifest: Manifest,
    unit: int,
    rows: Mapping[int, Placed],
    *,
    dropped: Mapping[int, str],
    tokens: Mapping[int, int],
) -> dict[str, bytes]:
    """Key -> bytes of all coordinates of a unit; ``tokens`` is the response length of each row, 0 if unknown."""
    layout = manifest.layout
    planned = layout.unit_row_range(unit)
    padding = layout.unit_rows - len(planned)
    columns: dict[str, list[Any]] = {
        name: [getattr(rows[row], name) for row in planned] for name in ("role_id", "prompt", "question", "sample")
    }
    columns["role"] = [manifest.tables["roles"][rows[row].role_id]["id"] for row in planned]
    columns["n_tokens"] = [tokens[row] for row in planned]
    columns["status"] = [STATUS.index("dropped" if row in dropped else "ok") for row in planned]
    fill = {"role": "", "status": STATUS.index("pad")}
    return {
        coordinate_key(name, unit): encode_coordinate(
            np.array(columns[name] + [fill.get(name, 0)] * padding, dtype=object if dtype == "string" else dtype),
            layout,
            name,
        )
        for name, (dtype, _) in COORDINATES.items()
    }
