"""Small runs, written through the store's own commits: what the tests of its readers read.

Unit ``u`` holds the rollouts of role ``min(u, 2)``; prompts take turns from row to row, and so do the questions.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.layout import Layout, coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import Fence
from personaspace.store.manifest import Manifest
from personaspace.store.plan import PlannedRow
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, Record
from personaspace.store.rollouts import Rollout, encode_rollouts
from personaspace.store.schema import COORDINATES, RESID_POST_MEAN, STATUS, ArraySpec, encode_coordinate, encode_shard

LAYOUT = Layout(segments=(10,), layers=5, hidden=3, unit_rows=4, layer_group=3)
"""Three units, the last with two rows of padding; groups of layers 0 to 2, and 3 to 4."""
ALL = [(unit, group) for unit in range(LAYOUT.units) for group in range(LAYOUT.groups)]
ROLES = ("default", "poet", "hacker")
QUESTIONS = ("q0", "q1", "q2")
OK, DROPPED, PAD = (STATUS.index(name) for name in ("ok", "dropped", "pad"))
MEAN = ArraySpec(name=RESID_POST_MEAN, description="Mean over the response")


def small_manifest(layout: Layout = LAYOUT, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "identity": {
            "model": {
                "name": "tiny",
                "revision": None,
                "files": {},
                "dtype": "float32",
                "template_hash": "t",
                "system_policy": "native",
            },
            "generate": {},
            "extract": {"pooling": "mean"},
            "store": {"precision": "lossless"},
        },
        "layout": layout,
        "arrays": (MEAN,),
        "tables": {
            "roles": [{"id": role, "kind": "dramatic", "description": role, "prompts": ["A", "B"]} for role in ROLES],
            "questions": [{"id": question, "category": "any", "text": f"{question}?"} for question in QUESTIONS],
        },
        "plan": (),
        "unit_order": tuple(range(layout.units)),
        "execution": {},
        "sessions": ({"epoch": 1, "user": "me", "host": "here", "started": "now", "git_commit": None, "packages": {}},),
    }
    return Manifest(**{**fields, **changes})


def planned(layout: Layout = LAYOUT) -> list[PlannedRow]:
    return [
        PlannedRow(
            row=row,
            rollout_id=f"{row:016x}",
            role_id=min(row // layout.unit_rows, 2),
            prompt=row % 2,
            question=row % 3,
            sample=0,
        )
        for row in layout.planned_rows()
    ]


def create(fence: Fence, layout: Layout = LAYOUT, **changes: Any) -> Manifest:
    """A run without any data."""
    return write_run(fence, None, small_manifest(layout, **changes), planned(layout))


def grow(fence: Fence, before: Manifest, rows: int) -> Manifest:
    """The run with one more segment."""
    layout = before.layout.grow(rows)
    after = replace(before, layout=layout, unit_order=tuple(range(layout.units)))
    return write_run(fence, before, after, planned(layout))


def values(layout: Layout = LAYOUT) -> NDArray[np.float32]:
    """What the run's array holds, ``(rows with padding, layers, hidden)``; the same rows after growth."""
    made = np.full((layout.padded_rows, layout.layers, layout.hidden), np.nan, dtype=np.float32)
    for row in layout.planned_rows():
        made[row] = np.random.default_rng(row).standard_normal(made.shape[1:])
    return made


def shard_bytes(layout: Layout, unit: int, group: int) -> bytes:
    layers = layout.group_layers(group)
    part = values(layout)[layout.unit_slice(unit), layers.start : layers.stop]
    return encode_shard(part, layout, "lossless")


def commit_shards(
    fence: Fence, layout: Layout, shards: Iterable[tuple[int, int]], array: str = RESID_POST_MEAN
) -> None:
    for unit, group in shards:
        objects = {shard_key(array, unit, group): shard_bytes(layout, unit, group)}
        commit(fence, (array, unit, group), objects, rows=layout.unit_row_range(unit), dropped={})


def coordinates(layout: Layout, unit: int, dropped: Collection[int] = ()) -> dict[str, bytes]:
    """Key -> bytes of a unit's coordinates; each rollout has ten tokens more than its row."""
    rows = layout.unit_row_range(unit)
    padding = [0] * (layout.unit_rows - len(rows))
    plan = {row.row: row for row in planned(layout)}
    status = [DROPPED if row in dropped else OK for row in rows] + [PAD] * len(padding)
    columns: dict[str, Any] = {
        name: [getattr(plan[row], name) for row in rows] + padding
        for name in ("role_id", "prompt", "question", "sample")
    }
    columns |= {"role": [ROLES[plan[row].role_id] for row in rows] + [""] * len(padding)}
    columns |= {"n_tokens": [row + 10 for row in rows] + padding, "status": status}
    return {
        coordinate_key(name, unit): encode_coordinate(
            np.array(columns[name], dtype=object if dtype == "string" else dtype), layout, name
        )
        for name, (dtype, _) in COORDINATES.items()
    }


def commit_coordinates(
    fence: Fence, layout: Layout, units: Iterable[int], dropped: Collection[int] = (), generation: int = 0
) -> None:
    for unit in units:
        rows = layout.unit_row_range(unit)
        commit(
            fence,
            (COORDINATES_RECORD, unit, 0),
            coordinates(layout, unit, dropped),
            rows=rows,
            dropped={row: "the response is empty" for row in rows if row in dropped},
            generation=generation,
        )


def commit_rollouts(fence: Fence, layout: Layout, units: Iterable[int]) -> list[Record]:
    return [
        commit(
            fence,
            (ROLLOUTS, unit, 0),
            {rollouts_key(unit): encode_rollouts([rollout(row) for row in planned(layout) if row.row in rows])},
            rows=rows,
            dropped={},
        )
        for unit in units
        for rows in [layout.unit_row_range(unit)]
    ]


def rollout(row: PlannedRow) -> Rollout:
    return Rollout(
        row=row.row,
        rollout_id=row.rollout_id,
        role=ROLES[row.role_id],
        role_id=row.role_id,
        prompt=row.prompt,
        question=row.question,
        sample=row.sample,
        messages=[{"role": "user", "content": f"{QUESTIONS[row.question]}?"}],
        response=f"Answer {row.row}",
        prompt_token_ids=[1],
        response_token_ids=[2] * (row.row + 10),
        finish_reason="stop",
        template_hash="t",
        sampling="{}",
        seed=row.row,
    )


def complete(fence: Fence, layout: Layout = LAYOUT, units: Iterable[int] | None = None) -> None:
    """Commit everything of all units, or of some."""
    chosen = list(range(layout.units) if units is None else units)
    commit_rollouts(fence, layout, chosen)
    commit_shards(fence, layout, [(unit, group) for unit in chosen for group in range(layout.groups)])
    commit_coordinates(fence, layout, chosen)
