"""Small fitted runs of which it is known how alike they are: what the tests of comparisons share.

Every role has a place in four dimensions that is the same in all runs; a run turns them into its own residual stream.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.layout import Layout, coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest
from personaspace.store.plan import PlannedRow
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS
from personaspace.store.rollouts import Rollout, encode_rollouts
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec, encode_coordinate, encode_shard

ROLES = (
    "default", "lawyer", "doctor", "analyst", "editor", "ghost", "demon", "witch", "golem", "poet", "pirate", "jester",
    "rebel",
)  # fmt: skip
KINDS = dict.fromkeys(ROLES[1:5], "professional") | dict.fromkeys(ROLES[5:9], "fantastical")
QUESTIONS = 6
WEIGHTS = "a" * 64


def places(roles: Sequence[str] = ROLES) -> NDArray[np.float64]:
    """``(R, 4)``: where the roles lie; default far out along the first dimension."""
    place = {role: np.random.default_rng(number).normal(size=4) for number, role in enumerate(ROLES)}
    place["default"] = np.array([4.0, 0, 0, 0])
    return np.array([place[role] for role in roles]) * np.array([3.0, 2.0, 1.5, 1.0])


def write_fitted(
    folder: LocalFolder,
    *,
    basis: int = 0,
    noise: float = 0.3,
    layers: int = 3,
    hidden: int = 16,
    roles: Sequence[str] = ROLES,
    moved: dict[str, float] | None = None,
    model: dict[str, Any] | None = None,
    say: str = "Answer",
    fitted: bool = True,
) -> LocalFolder:
    """A run and its fit.

    Runs with the same ``basis`` share a residual stream. ``moved``: role -> how far along the axis.
    """
    place_RC = places(roles)
    for role, distance in (moved or {}).items():
        place_RC[list(roles).index(role), 0] += distance
    layout = Layout(
        segments=(len(roles) * QUESTIONS,), layers=layers, hidden=hidden, unit_rows=QUESTIONS, layer_group=1
    )
    turn_LCD = np.linalg.qr(np.random.default_rng(1000 + basis).normal(size=(layers, hidden, 4)))[0].transpose(0, 2, 1)
    generator = np.random.default_rng([basis, len(say), layers])
    values_NLD = np.einsum("rc,lcd->rld", place_RC, turn_LCD).repeat(QUESTIONS, axis=0)
    values_NLD = (values_NLD + noise * generator.normal(size=values_NLD.shape)).astype(np.float32)
    identity = {
        "model": {
            "name": "tiny", "revision": None, "files": {"model.safetensors": WEIGHTS}, "dtype": "float32",
            "template_hash": "t", "system_policy": "native", **(model or {}),
        },
        "generate": {"seed": 0},
        "extract": {"pooling": "mean"},
        "store": {"layers": layers, "precision": "lossless"},
    }  # fmt: skip
    manifest = Manifest(
        identity=identity,
        layout=layout,
        arrays=(ArraySpec(name=RESID_POST_MEAN, description="test"),),
        tables={
            "roles": [
                {"id": role, "kind": KINDS.get(role, "dramatic"), "description": role, "prompts": ["A"]}
                for role in roles
            ],
            "questions": [{"id": f"q{number}", "text": f"Question {number}?"} for number in range(QUESTIONS)],
        },
        plan=(),
        unit_order=tuple(range(len(roles))),
        execution={},
        sessions=({"epoch": 1, "host": "here", "started": "now", "git_commit": None, "packages": {}},),
    )
    planned = [
        PlannedRow(
            row=row, rollout_id=f"{row:016x}", role_id=row // QUESTIONS, prompt=0, question=row % QUESTIONS, sample=0
        )
        for row in range(layout.rows)
    ]
    with acquire(folder, timeout=60, say=print) as lease:
        write_run(lease.fence, None, manifest, planned)
        for unit, role in enumerate(roles):
            rows = layout.unit_row_range(unit)
            data = {rollouts_key(unit): encode_rollouts([_rollout(planned[row], role, say) for row in rows])}
            commit(lease.fence, (ROLLOUTS, unit, 0), data, rows=rows, dropped={})
            for layer in range(layers):
                part = encode_shard(values_NLD[layout.unit_slice(unit), layer : layer + 1], layout, "lossless")
                slot = (RESID_POST_MEAN, unit, layer)
                commit(lease.fence, slot, {shard_key(*slot): part}, rows=rows, dropped={})
            columns = {
                "role": np.array([role] * QUESTIONS, dtype=object),
                "role_id": np.full(QUESTIONS, unit, np.int32),
                "prompt": np.zeros(QUESTIONS, np.int32),
                "question": np.arange(QUESTIONS, dtype=np.int32),
                "sample": np.zeros(QUESTIONS, np.int32),
                "n_tokens": np.ones(QUESTIONS, np.int32),
                "status": np.ones(QUESTIONS, np.uint8),
            }
            objects = {coordinate_key(name, unit): encode_coordinate(x, layout, name) for name, x in columns.items()}
            commit(lease.fence, (COORDINATES_RECORD, unit, 0), objects, rows=rows, dropped={})
    if fitted:
        fit(folder, AnalysisConfig(permutations=20, components=4))
    return folder


def _rollout(row: PlannedRow, role: str, say: str) -> Rollout:
    return Rollout(
        row=row.row,
        rollout_id=row.rollout_id,
        role=role,
        role_id=row.role_id,
        prompt=0,
        question=row.question,
        sample=0,
        messages=[
            {"role": "system", "content": f"Be a {role}."},
            {"role": "user", "content": f"Question {row.question}?"},
        ],
        response=f"{say} {row.row}",
        prompt_token_ids=[1],
        response_token_ids=[2],
        finish_reason="stop",
        template_hash="t",
        sampling="{}",
        seed=0,
    )
