"""A unit's coordinates as bytes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from personaspace.store.layout import coordinate_key
from personaspace.store.manifest import Manifest
from personaspace.store.rollouts import Span
from personaspace.store.schema import COORDINATES, PARTS, SPAN_COORDINATES, SPANS, STATUS, encode_coordinate


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


def unit_span_coordinates(manifest: Manifest, unit: int, spans: Mapping[int, Sequence[Span]]) -> dict[str, bytes]:
    """Key -> bytes of all coordinates of a unit's spans; ``spans`` are those of each row that have a place.

    A row's places that it has no spans for stay unused, as do those of rows that are not in ``spans``.
    """
    capacity = manifest.spans_per_rollout
    layout = manifest.layout.of_spans(capacity)
    first = manifest.layout.unit_slice(unit).start
    columns = {name: np.zeros(layout.unit_rows, dtype=dtype) for name, (dtype, _) in SPAN_COORDINATES.items()}
    for row, own in spans.items():
        for place, span in enumerate(own, start=(row - first) * capacity):
            columns["rollout"][place] = row
            columns["turn"][place] = span.turn
            columns["part"][place] = PARTS.index(span.part)
            columns["count"][place] = span.stop - span.start
    return {
        coordinate_key(f"{SPANS}/{name}", unit): encode_coordinate(column, layout, name, spans=True)
        for name, column in columns.items()
    }
