"""Runs with roles, conversations or both, written through the store's own commits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.layout import Layout, coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest
from personaspace.store.plan import PlannedRow
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS
from personaspace.store.rollouts import Rollout, Span, encode_rollouts
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec, encode_coordinate, encode_shard

PLACES = {"default": 3.0, "pirate": -2.0, "ghost": -3.0, "doctor": 1.0}
"""Role -> where its rollouts lie along the first dimension."""
TALKS = {
    "coding.slow": [3.0, 3.1, 2.9, 3.0],
    "coding.flaky": [4.0, 4.2],
    "therapy.city": [3.3, 1.0, -1.0, -4.0],
    "therapy.loss": [3.0],
}
"""Scenario -> where its turns lie; the last one has no second turn."""
UNIT, LAYERS, HIDDEN, TURNS = 4, 2, 8, 4
MEAN = ArraySpec(name=RESID_POST_MEAN, description="test")
BY_TURN = ArraySpec(name=RESID_POST_MEAN, description="test", spans=("whole",))
DOMAINS = list(dict.fromkeys(scenario.split(".")[0] for scenario in TALKS))


def write_talk_run(
    path: Path,
    *,
    roles: bool = True,
    talks: bool = True,
    arrays: tuple[ArraySpec, ...] = (MEAN, BY_TURN),
    **model: Any,
) -> LocalFolder:
    """A run of ``roles`` (four rollouts each, `default` too), of ``talks``, or of both; ``model``: of its identity.

    Rows: four of each role, then one of each conversation.
    """
    folder = LocalFolder(path)
    rows = _rollouts(list(PLACES) if roles else [], talks)
    layout = Layout(segments=(len(rows),), layers=LAYERS, hidden=HIDDEN, unit_rows=UNIT, layer_group=1)
    names = list(dict.fromkeys(rollout.role for rollout, _ in rows))
    kinds = ["scenario" if name.startswith("scenario.") else "dramatic" for name in names]
    manifest = Manifest(
        identity={
            "model": {
                "name": "tiny",
                "revision": None,
                "files": {"model.safetensors": "ab12"},
                "dtype": "float32",
                "attention": "auto",
                "template_hash": "t",
                "system_policy": "native",
                **model,
            },
            "generate": {},
            "extract": {"pooling": "mean"},
            "store": {"precision": "lossless"},
        },
        layout=layout,
        arrays=arrays,
        spans_per_rollout=TURNS if any(spec.spans for spec in arrays) else 0,
        tables={
            "roles": [
                {"id": name, "kind": kind, "description": name, "prompts": [""]}
                for name, kind in zip(names, kinds, strict=True)
            ],
            "questions": [
                *({"id": f"q{number}", "category": "any", "text": f"Question {number}?"} for number in range(UNIT)),
                *({"id": name, "category": name.split(".")[0], "text": f"About {name}."} for name in TALKS),
            ],
        },
        plan=(),
        unit_order=tuple(range(layout.units)),
        execution={},
        sessions=({"epoch": 1, "host": "here", "started": "now", "git_commit": None, "packages": {}},),
    )
    names_of = PlannedRow.__dataclass_fields__
    planned = [PlannedRow(**{name: getattr(rollout, name) for name in names_of}) for rollout, _ in rows]
    with acquire(folder, timeout=60, say=print) as lease:
        write_run(lease.fence, None, manifest, planned)
        for unit in range(layout.units):
            _commit_unit(lease.fence, manifest, unit, rows[UNIT * unit : UNIT * unit + UNIT])
    return folder


def write_fitted_run(path: Path, **changes: Any) -> LocalFolder:
    """The same, with its space."""
    folder = write_talk_run(path, **changes)
    fit(folder, AnalysisConfig(permutations=20))
    return folder


def _rollouts(roles: list[str], talks: bool) -> list[tuple[Rollout, list[float]]]:
    """Rollouts, each with the places of its turns."""
    rows: list[tuple[Rollout, list[float]]] = []
    for role_id, role in enumerate(roles):
        for number in range(UNIT):
            rows.append((_rollout(len(rows), role, role_id, number, 1), [PLACES[role]]))
    for number, (scenario, way) in enumerate(TALKS.items() if talks else ()):
        domain = scenario.split(".")[0]
        role_id = len(roles) + DOMAINS.index(domain)
        rows.append((_rollout(len(rows), f"scenario.{domain}", role_id, UNIT + number, len(way)), way))
    return rows


def _rollout(row: int, role: str, role_id: int, question: int, turns: int) -> Rollout:
    messages = [{"role": "system", "content": "Be kind."}] if row % 2 else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Said {turn} in {row}"})
        messages.append({"role": "assistant", "content": f"Answer {turn} in {row} <script>window.hacked=1</script>"})
    return Rollout(
        row=row,
        rollout_id=f"{row:016x}",
        role=role,
        role_id=role_id,
        prompt=0,
        question=question,
        sample=0,
        messages=messages[:-1],
        response=messages[-1]["content"],
        prompt_token_ids=[1] * 50,
        response_token_ids=[2, 2],
        spans=[Span(turn=turn, part="whole", start=5 * turn, stop=5 * turn + 2 + turn) for turn in range(turns)],
        finish_reason="stop",
        template_hash="t",
        sampling=json.dumps({"written_by": "somebody/else-70B"} if role == "scenario.therapy" else {}),
        seed=0,
    )


def _commit_unit(fence: Fence, manifest: Manifest, unit: int, rows: list[tuple[Rollout, list[float]]]) -> None:
    layout, numbers = manifest.layout, manifest.layout.unit_row_range(unit)
    parts = {rollouts_key(unit): encode_rollouts([rollout for rollout, _ in rows])}
    commit(fence, (ROLLOUTS, unit, 0), parts, rows=numbers, dropped={})
    spans = layout.of_spans(TURNS)
    for spec in manifest.arrays:
        own = spans if spec.spans else layout
        data = _unit_values(rows, by_turn=bool(spec.spans))
        for group in range(layout.groups):
            shard = encode_shard(data[:, group : group + 1], own, "lossless")
            key = shard_key(spec.path, unit, group)
            commit(fence, (spec.record, unit, group), {key: shard}, rows=numbers, dropped={})
    columns = {
        "role": np.array([rollout.role for rollout, _ in rows], dtype=object),
        "n_tokens": np.full(UNIT, 2, np.int32),
        "status": np.ones(UNIT, np.uint8),
        **{
            name: np.array([getattr(rollout, name) for rollout, _ in rows], np.int32)
            for name in ("role_id", "prompt", "question", "sample")
        },
    }
    objects = {coordinate_key(name, unit): encode_coordinate(x, layout, name) for name, x in columns.items()}
    commit(fence, (COORDINATES_RECORD, unit, 0), objects, rows=numbers, dropped={})
    if manifest.spans_per_rollout:
        used = [(rollout.row, turn, int(turn < len(way)), 2 + turn) for rollout, way in rows for turn in range(TURNS)]
        dtypes = {"rollout": np.int32, "turn": np.int32, "part": np.uint8, "count": np.int32}
        objects = {
            coordinate_key(f"spans/{name}", unit): encode_coordinate(
                np.array([entry[number] for entry in used], dtype), spans, name, spans=True
            )
            for number, (name, dtype) in enumerate(dtypes.items())
        }
        commit(fence, ("spans.coordinates", unit, 0), objects, rows=numbers, dropped={})


def _unit_values(rows: list[tuple[Rollout, list[float]]], *, by_turn: bool) -> NDArray[np.float32]:
    """Each rollout's last turn, or all of its turns with NaN in unused places: ``(rows, layers, hidden)``."""
    values = np.full((UNIT * TURNS if by_turn else UNIT, LAYERS, HIDDEN), np.nan, dtype=np.float32)
    for number, (rollout, way) in enumerate(rows):
        noise = 0.1 * np.random.default_rng(rollout.row).normal(size=(LAYERS, HIDDEN))
        for turn, place in enumerate(way):
            where = TURNS * number + turn if by_turn else number
            values[where] = place * np.eye(HIDDEN)[0] + noise
    return values
