"""Data for benchmarks/store.py: the activations of a real run, tiled up to any size, and runs written from them.

Legend: U rows of a unit, N rows, S roles of the source, L layers, D hidden.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.store import open_run, select
from personaspace.store.commit import commit
from personaspace.store.config import Precision
from personaspace.store.creation import write_run
from personaspace.store.index import write_index
from personaspace.store.layout import (
    Layout,
    choose_layer_group,
    coordinate_key,
    interleave,
    rollouts_key,
    shard_key,
)
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest
from personaspace.store.plan import PlannedRow
from personaspace.store.records import (
    COORDINATES_RECORD,
    ROLLOUTS,
)
from personaspace.store.rollouts import Rollout, encode_rollouts
from personaspace.store.schema import (
    COORDINATES,
    RESID_POST_MEAN,
    STATUS,
    ArraySpec,
    encode_coordinate,
    encode_shard,
)

ROLES = 276
"""Roles of the reference project's persona set, `default` among them."""
UNIT_ROWS = 120
"""R of a run with the reference project's 1,200 rollouts a role."""
QUESTIONS = 24
NO_SOURCE = "0" * 64
NOISE = 1e-3
"""Relative noise on every tiled value: no two tiles share a value, outlier dimensions stay what they are."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A run of any size from a source: a role is a source role's mean plus the deviations of rows drawn anew."""

    source: Path
    """Folder with `mean_SLD.npy` and `deviation_NLD.npy`."""
    layout: Layout
    rows_per_role: int

    @property
    def roles(self) -> int:
        return self.layout.rows // self.rows_per_role

    @property
    def bytes(self) -> int:
        """Of all values as float32."""
        return self.layout.rows * self.layout.layers * self.layout.hidden * 4

    def name(self, role: int) -> str:
        return f"role{role:03d}" if role else "default"

    def units_of_role(self, role: int) -> range:
        each = self.rows_per_role // self.layout.unit_rows
        return range(role * each, (role + 1) * each)

    def unit_ULD(self, unit: int) -> NDArray[np.float32]:
        """Values of one unit; the same at every call."""
        mean_SLD, deviation_NLD = load_source(self.source)
        random = np.random.default_rng([2, unit])
        # No row twice in a chunk of the store, or it would compress as it never does.
        values_ULD = deviation_NLD[np.resize(random.permutation(len(deviation_NLD)), self.layout.unit_rows)]
        role = unit * self.layout.unit_rows // self.rows_per_role
        # Role 0 is `default` in both; the others go round the source's roles.
        values_ULD += mean_SLD[1 + (role - 1) % (len(mean_SLD) - 1) if role else 0]
        for values_LD in values_ULD:
            values_LD *= 1 + NOISE * random.standard_normal(values_LD.shape, dtype=np.float32)
        return values_ULD

    def role_values(self, role: int) -> NDArray[np.float32]:
        """All rows of one role, ``(rows_per_role, L, D)``."""
        return np.concatenate([self.unit_ULD(unit) for unit in self.units_of_role(role)])


def save_source(url: str, folder: Path) -> dict[str, Any]:
    """Read a run through ``open_run``, and keep its role means and the deviations from them; returns what it is."""
    run = select(open_run(url))
    values_NLD = run[RESID_POST_MEAN].values
    names = run["role"].values
    order = ["default", *sorted(set(names) - {"default"})]
    mean_SLD = np.stack([values_NLD[names == name].mean(axis=0) for name in order])
    place = {name: rank for rank, name in enumerate(order)}
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "mean_SLD.npy", mean_SLD)
    np.save(folder / "deviation_NLD.npy", values_NLD - mean_SLD[[place[name] for name in names]])
    attributes = {name: run.attrs[name] for name in ("run", "model", "precision")}
    return {**attributes, "rows": len(values_NLD), "roles": len(order), "shape": list(values_NLD.shape[1:])}


@cache
def load_source(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means and deviations that ``save_source`` kept."""
    return np.load(folder / "mean_SLD.npy"), np.load(folder / "deviation_NLD.npy")


def plan_tiles(source: Path, gigabytes: float) -> Tiles:
    """The smallest run of at least so many bytes of float32; 276 roles where they fill at least one unit each."""
    _, layers, hidden = load_source(source)[0].shape
    units = math.ceil(gigabytes * 1e9 / (4 * layers * hidden * UNIT_ROWS))
    each, roles = (math.ceil(units / ROLES), ROLES) if units > ROLES else (1, max(3, units))
    layout = Layout(
        segments=(roles * each * UNIT_ROWS,),
        layers=layers,
        hidden=hidden,
        unit_rows=UNIT_ROWS,
        layer_group=choose_layer_group(layers),
    )
    return Tiles(source=source, layout=layout, rows_per_role=each * UNIT_ROWS)


@contextmanager
def create_run(folder: LocalFolder, tiles: Tiles, precision: Precision) -> Iterator[Fence]:
    """A new run without any data, and the lease to write it. What was written is indexed at the end."""
    with acquire(folder, timeout=60, say=print) as lease:
        manifest = write_run(lease.fence, None, _manifest(tiles, precision), list(planned_rows(tiles)))
        yield lease.fence
        write_index(lease.fence, manifest)


def write_units(fence: Fence, tiles: Tiles, precision: Precision, threads: int) -> None:
    """Everything of every unit: rollouts, shards, coordinates, all with their records."""

    def write(units: Iterable[int]) -> None:
        for unit in units:
            values_ULD = tiles.unit_ULD(unit)
            commit_rollouts(fence, tiles, unit)
            for group in range(tiles.layout.groups):
                commit_shard(fence, tiles.layout, unit, group, encode_group(values_ULD, tiles.layout, group, precision))
            commit_coordinates(fence, tiles, unit)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, [range(first, tiles.layout.units, threads) for first in range(threads)]))


def encode_group(values_ULD: NDArray[np.float32], layout: Layout, group: int, precision: Precision) -> bytes:
    layers = layout.group_layers(group)
    return encode_shard(values_ULD[:, layers.start : layers.stop], layout, precision)


def commit_shard(fence: Fence, layout: Layout, unit: int, group: int, data: bytes) -> None:
    """As a stage actor does it."""
    commit(
        fence,
        (RESID_POST_MEAN, unit, group),
        {shard_key(RESID_POST_MEAN, unit, group): data},
        rows=layout.unit_row_range(unit),
        dropped={},
        source=NO_SOURCE,
    )


def commit_rollouts(fence: Fence, tiles: Tiles, unit: int) -> None:
    rows = tiles.layout.unit_row_range(unit)
    rollouts = [
        Rollout(
            row=entry.row,
            rollout_id=entry.rollout_id,
            role=tiles.name(entry.role_id),
            role_id=entry.role_id,
            prompt=entry.prompt,
            question=entry.question,
            sample=entry.sample,
            messages=[{"role": "user", "content": f"Question {entry.question}?"}],
            response="An answer.",
            prompt_token_ids=[1, 2, 3],
            response_token_ids=[4, 5],
            finish_reason="stop",
            template_hash="0" * 16,
            sampling="{}",
            seed=0,
        )
        for entry in planned_rows(tiles, rows)
    ]
    commit(fence, (ROLLOUTS, unit, 0), {rollouts_key(unit): encode_rollouts(rollouts)}, rows=rows, dropped={})


def commit_coordinates(fence: Fence, tiles: Tiles, unit: int) -> None:
    entries = list(planned_rows(tiles, tiles.layout.unit_row_range(unit)))
    columns: dict[str, NDArray[Any]] = {
        name: np.array([getattr(entry, name) for entry in entries], dtype=np.int32)
        for name in ("role_id", "prompt", "question", "sample")
    }
    columns["role"] = np.array([tiles.name(entry.role_id) for entry in entries], dtype=object)
    columns["n_tokens"] = np.full(len(entries), 2, dtype=np.int32)
    columns["status"] = np.full(len(entries), STATUS.index("ok"), dtype=np.uint8)
    commit(
        fence,
        (COORDINATES_RECORD, unit, 0),
        {coordinate_key(name, unit): encode_coordinate(columns[name], tiles.layout, name) for name in COORDINATES},
        rows=tiles.layout.unit_row_range(unit),
        dropped={},
        source=NO_SOURCE,
        covers=tuple(f"{RESID_POST_MEAN}.{group:03d}" for group in range(tiles.layout.groups)),
    )


def planned_rows(tiles: Tiles, rows: Iterable[int] | None = None) -> Iterable[PlannedRow]:
    for row in tiles.layout.planned_rows() if rows is None else rows:
        role, rest = divmod(row, tiles.rows_per_role)
        sample, question = divmod(rest, QUESTIONS)
        yield PlannedRow(row=row, rollout_id=f"{row:016x}", role_id=role, prompt=0, question=question, sample=sample)


def _manifest(tiles: Tiles, precision: Precision) -> Manifest:
    layout = tiles.layout
    first_role = [unit * layout.unit_rows // tiles.rows_per_role for unit in range(layout.units)]
    identity: Mapping[str, Any] = {
        "model": {"name": "tiled"},
        "store": {"layers": layout.layers, "hidden": layout.hidden, "precision": precision},
    }
    return Manifest(
        identity=identity,
        layout=layout,
        arrays=(ArraySpec(name=RESID_POST_MEAN, description="Tiled from a real run"),),
        tables={
            "roles": [
                {"id": tiles.name(role), "kind": "unknown", "description": "", "prompts": [""]}
                for role in range(tiles.roles)
            ],
            "questions": [
                {"id": f"q{n:03d}", "category": "unknown", "text": f"Question {n}?"} for n in range(QUESTIONS)
            ],
        },
        plan=(),
        unit_order=tuple(interleave(first_role)),
        execution={},
        sessions=({"epoch": 1, "user": "benchmark", "host": "", "started": "", "git_commit": None},),
    )
