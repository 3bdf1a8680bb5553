"""A small complete run with every kind of array, and what other readers should find in it.

Legend: N places on an array's first axis, L layers, D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from personaspace.store.commit import commit
from personaspace.store.config import Precision
from personaspace.store.creation import write_run
from personaspace.store.layout import ZARR_GROUP, Layout, coordinate_key, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest, read_manifest
from personaspace.store.plan import PlannedRow
from personaspace.store.records import COORDINATES_RECORD
from personaspace.store.schema import (
    COORDINATES,
    PARTS,
    RESID_POST_MEAN,
    SPAN_COORDINATES,
    STATUS,
    ArraySpec,
    encode_coordinate,
    encode_shard,
    round_mantissa,
)

SPANS_PER_ROLLOUT = 2
FIRST = Layout(segments=(10,), layers=5, hidden=6, unit_rows=4, layer_group=3)
"""Three units, the last half full; two groups of layers, the last short of one layer."""
GROWN = FIRST.grow(5)
MEAN = ArraySpec(name=RESID_POST_MEAN, description="Mean over the response")
TURNS = ArraySpec(name="resid_post_turn", description="Mean over each turn", spans=("whole",))
ROLES = ("default", "poète", "日本の詩人")
DROPPED = 3
"""Row that is NaN in every layer."""


def write_run_of(folder: LocalFolder, precision: Precision) -> Path:
    """Write the run with its first segment; returns its Zarr group."""
    with _holding(folder, FIRST, precision) as fence:
        _commit_units(fence, FIRST, FIRST.segment_units[0], precision)
    return folder.path / ZARR_GROUP


def grow_run(folder: LocalFolder, precision: Precision) -> None:
    """Add the second segment."""
    with _holding(folder, GROWN, precision) as fence:
        _commit_units(fence, GROWN, GROWN.segment_units[1], precision)


def values(spec: ArraySpec, layout: Layout, precision: Precision) -> NDArray[np.float32]:
    """What an array holds: values of every size, rounded as they are stored. The same rows after growth."""
    layout = layout_of(spec.spans, layout)
    shape = (layout.unit_rows, layout.layers, layout.hidden)
    draws = [np.random.default_rng([unit, len(spec.name)]) for unit in range(layout.units)]
    wild = [draw.standard_normal(shape) * 10.0 ** draw.integers(-30, 30, shape) for draw in draws]
    found_NLD = np.concatenate(wild).astype(np.float32)
    found_NLD[0, 0, :4] = (0.0, -0.0, np.finfo(np.float32).max, -np.finfo(np.float32).tiny)
    rounded_NLD = round_mantissa(found_NLD, precision)
    kept = [row for row in layout.planned_rows() if row != DROPPED]
    rounded_NLD[~np.isin(np.arange(layout.padded_rows), kept)] = np.nan
    return rounded_NLD


def coordinates(layout: Layout) -> dict[str, NDArray[Any]]:
    """Name -> values of every coordinate of the rollouts; padding is 0 or empty."""
    columns: dict[str, NDArray[Any]] = {
        name: np.full(layout.padded_rows, "" if dtype == "string" else 0, dtype=object if dtype == "string" else dtype)
        for name, (dtype, _) in COORDINATES.items()
    }
    columns["status"][:] = STATUS.index("pad")
    for entry in _planned(layout):
        columns["role"][entry.row] = ROLES[entry.role_id]
        columns["n_tokens"][entry.row] = 1_000_000 + entry.row
        columns["status"][entry.row] = STATUS.index("dropped" if entry.row == DROPPED else "ok")
        for name in ("role_id", "prompt", "question", "sample"):
            columns[name][entry.row] = getattr(entry, name)
    return columns


def span_coordinates(layout: Layout) -> dict[str, NDArray[Any]]:
    place = np.arange(layout_of(True, layout).padded_rows)
    columns = {
        "rollout": place // SPANS_PER_ROLLOUT,
        "turn": place % SPANS_PER_ROLLOUT,
        "part": place % len(PARTS),
        "count": place * 7,
    }
    return {name: columns[name].astype(dtype) for name, (dtype, _) in SPAN_COORDINATES.items()}


def layout_of(spans: bool, layout: Layout) -> Layout:
    return layout.of_spans(SPANS_PER_ROLLOUT) if spans else layout


def everything(layout: Layout, precision: Precision) -> dict[str, NDArray[Any]]:
    """Path in the group -> values of every array."""
    return {
        MEAN.path: values(MEAN, layout, precision),
        TURNS.path: values(TURNS, layout, precision),
        **coordinates(layout),
        **{f"spans/{name}": column for name, column in span_coordinates(layout).items()},
        "layer": np.arange(layout.layers, dtype=np.int32),
        "spans/layer": np.arange(layout.layers, dtype=np.int32),
    }


def _planned(layout: Layout) -> list[PlannedRow]:
    return [
        PlannedRow(row=row, rollout_id=f"{row:016x}", role_id=row % 3, prompt=row % 2, question=0, sample=row)
        for row in layout.planned_rows()
    ]


@contextmanager
def _holding(folder: LocalFolder, layout: Layout, precision: Precision) -> Iterator[Fence]:
    """The run with the segments of ``layout``, and the lease to fill them."""
    before = read_manifest(folder)
    roles = [{"id": role, "kind": "unknown", "description": "", "prompts": ["A", "B"]} for role in ROLES]
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        after = Manifest(
            identity={"model": {"name": "tiny"}, "store": {"precision": precision}},
            layout=layout,
            arrays=(MEAN, TURNS),
            spans_per_rollout=SPANS_PER_ROLLOUT,
            tables={"roles": roles, "questions": [{"id": "q000", "category": "unknown", "text": "Who are you?"}]},
            plan=() if before is None else before.plan,
            unit_order=tuple(range(layout.units)),
            metadata=() if before is None else before.metadata,
            execution={},
            sessions=({"epoch": lease.epoch},),
        )
        write_run(lease.fence, before, after, _planned(layout))
        yield lease.fence


def _commit_units(fence: Fence, layout: Layout, units: range, precision: Precision) -> None:
    for spec in (MEAN, TURNS):
        stored_NLD, own = values(spec, layout, precision), layout_of(spec.spans, layout)
        for unit in units:
            for group in range(layout.groups):
                layers = layout.group_layers(group)
                shard = encode_shard(stored_NLD[own.unit_slice(unit), layers.start : layers.stop], own, precision)
                objects = {shard_key(spec.path, unit, group): shard}
                commit(fence, (spec.record, unit, group), objects, rows=own.unit_row_range(unit), dropped={})
    for spans, columns in ((False, coordinates(layout)), (True, span_coordinates(layout))):
        own = layout_of(spans, layout)
        for unit in units:
            objects = {
                coordinate_key(f"spans/{name}" if spans else name, unit): encode_coordinate(
                    column[own.unit_slice(unit)], own, name, spans=spans
                )
                for name, column in columns.items()
            }
            slot = (f"spans.{COORDINATES_RECORD}" if spans else COORDINATES_RECORD, unit, 0)
            commit(fence, slot, objects, rows=own.unit_row_range(unit), dropped={})
