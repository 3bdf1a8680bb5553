"""A small complete run of every kind of array, and what other readers should find in it.

Legend: N places on the rollout axis, S on the span axis, L layers, D hidden.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from personaspace.store.commit import COORDINATES_RECORD, commit
from personaspace.store.config import Precision
from personaspace.store.creation import write_run
from personaspace.store.index import write_index
from personaspace.store.layout import ZARR_GROUP, Layout, coordinate_key, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest, read_manifest
from personaspace.store.plan import PlannedRow
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
ARRAYS = (
    ArraySpec(name=RESID_POST_MEAN, description="Mean over the response tokens"),
    ArraySpec(name="resid_post_turn", description="Mean over each turn", spans=True),
)
ROLES = ("default", "poet", "日本の詩人")
DROPPED = 3
"""Row that is NaN in every layer."""


def values(spec: ArraySpec, layout: Layout, precision: Precision) -> NDArray[np.float32]:
    """What is stored of an array, on its whole padded axis."""
    layout = shape_of(spec, layout)
    # A run that grows keeps the values of its first units.
    draws = [np.random.default_rng([len(spec.name), unit]) for unit in range(layout.units)]
    shape = (layout.unit_rows, layout.layers, layout.hidden)
    wild = [draw.standard_normal(shape) * 10.0 ** draw.integers(-30, 30, shape) for draw in draws]
    found_NLD = np.concatenate(wild).astype(np.float32)
    found_NLD[0, 0, :4] = (0.0, -0.0, np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal)
    rounded_NLD = round_mantissa(found_NLD, precision)
    rows = np.isin(np.arange(layout.padded_rows), [row for row in layout.planned_rows() if row != DROPPED])
    rounded_NLD[~rows] = np.nan
    return rounded_NLD


def shape_of(spec: ArraySpec, layout: Layout) -> Layout:
    return layout.of_spans(SPANS_PER_ROLLOUT) if spec.spans else layout


def coordinates(layout: Layout) -> dict[str, NDArray[Any]]:
    """Every coordinate of the rollouts, on the whole padded axis."""
    planned = np.isin(np.arange(layout.padded_rows), list(layout.planned_rows()))
    role_id = np.arange(layout.padded_rows) % len(ROLES)
    status = np.where(planned, STATUS.index("ok"), STATUS.index("pad"))
    status[DROPPED] = STATUS.index("dropped")
    numbers = {name: np.arange(layout.padded_rows) * 1000 + place for place, name in enumerate(COORDINATES)}
    columns = {**numbers, "role_id": role_id, "status": status}
    return {
        name: np.array([ROLES[index] for index in role_id], dtype=object)
        if dtype == "string"
        else np.where(planned | (name == "status"), columns[name], 0).astype(dtype)
        for name, (dtype, _) in COORDINATES.items()
    }


def span_coordinates(layout: Layout) -> dict[str, NDArray[Any]]:
    place = np.arange(layout.of_spans(SPANS_PER_ROLLOUT).padded_rows)
    columns = {
        "rollout": place // SPANS_PER_ROLLOUT,
        "turn": place % SPANS_PER_ROLLOUT,
        "part": place % len(PARTS),
        "count": place * 7,
    }
    return {name: columns[name].astype(dtype) for name, (dtype, _) in SPAN_COORDINATES.items()}


def write(folder: LocalFolder, precision: Precision) -> Path:
    """Write the run with its first segment; returns its Zarr group."""
    with _growing(folder, FIRST, precision) as fence:
        _commit_units(fence, FIRST, FIRST.segment_units[0], precision)
    return folder.path / ZARR_GROUP


def grow(folder: LocalFolder, precision: Precision) -> None:
    """Add the second segment."""
    with _growing(folder, GROWN, precision) as fence:
        _commit_units(fence, GROWN, GROWN.segment_units[1], precision)


@contextmanager
def _growing(folder: LocalFolder, layout: Layout, precision: Precision) -> Iterator[Fence]:
    before = read_manifest(folder)
    tables: Mapping[str, Any] = {
        "roles": [{"id": role, "kind": "unknown", "description": "", "prompts": [""]} for role in ROLES],
        "questions": [{"id": "q000", "category": "unknown", "text": "Who are you?"}],
    }
    after = Manifest(
        identity={"model": {"name": "tiny"}, "store": {"precision": precision}},
        layout=layout,
        arrays=ARRAYS,
        spans_per_rollout=SPANS_PER_ROLLOUT,
        tables=tables,
        plan=() if before is None else before.plan,
        unit_order=tuple(range(layout.units)),
        metadata=() if before is None else before.metadata,
        execution={},
    )
    rows = [
        PlannedRow(row=row, rollout_id=f"{row:04x}", role_id=row % len(ROLES), prompt=0, question=0, sample=row)
        for row in layout.planned_rows()
    ]
    after_epoch = 0 if before is None else 1
    with acquire(folder, timeout=60, say=pytest.fail, after_epoch=after_epoch) as lease:
        stored = write_run(lease.fence, before, replace(after, sessions=({"epoch": lease.epoch},)), rows)
        yield lease.fence
        write_index(lease.fence, stored)


def _commit_units(fence: Fence, layout: Layout, units: range, precision: Precision) -> None:
    for spec in ARRAYS:
        stored, shape = values(spec, layout, precision), shape_of(spec, layout)
        for unit in units:
            for group in range(layout.groups):
                layers = layout.group_layers(group)
                shard = encode_shard(stored[shape.unit_slice(unit), layers.start : layers.stop], shape, precision)
                key = shard_key(spec.path, unit, group)
                commit(fence, (spec.record, unit, group), {key: shard}, rows=layout.unit_row_range(unit), dropped={})
    for prefix, columns, spans in (("", coordinates(layout), False), ("spans/", span_coordinates(layout), True)):
        shape = layout.of_spans(SPANS_PER_ROLLOUT) if spans else layout
        for unit in units:
            rows = shape.unit_slice(unit)
            chunks = {
                coordinate_key(prefix + name, unit): encode_coordinate(column[rows], shape, name, spans=spans)
                for name, column in columns.items()
            }
            slot = (prefix.replace("/", ".") + COORDINATES_RECORD, unit, 0)
            commit(fence, slot, chunks, rows=layout.unit_row_range(unit), dropped={})
