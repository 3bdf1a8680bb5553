"""The fit step on a run in the store, written through the store's own commits."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit, open_space, target_layer
from personaspace.analysis.publish import publish_report
from personaspace.store import open_run
from personaspace.store.commit import COORDINATES_RECORD, ROLLOUTS, commit
from personaspace.store.errors import InputError
from personaspace.store.layout import Layout, coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest, write_session
from personaspace.store.rollouts import Rollout, encode_rollouts
from personaspace.store.schema import RESID_POST_MEAN, create_group, encode_coordinate, encode_shard

ROLES = ["default", "pirate", "ghost", "doctor", "lawyer"]
KINDS = ["assistant", "dramatic", "fantastical", "professional", "professional"]
QUESTIONS = 6
LAYOUT = Layout(segments=(30,), layers=2, hidden=8, unit_rows=6, layer_group=1)


def write_run(path: Path, units: int = 5) -> np.ndarray:
    """A run of five roles with six answers each; row 7 (pirate) is dropped. Returns its values ``(30, 2, 8)``."""
    folder = LocalFolder(path)
    generator = np.random.default_rng(0)
    place = np.repeat([3.0, -2.0, -3.0, 1.0, 2.0], QUESTIONS)
    values = (place[:, None, None] * np.eye(8)[0] + 0.1 * generator.normal(size=(30, 2, 8))).astype(np.float32)
    values[7] = np.nan
    path.mkdir()
    create_group(path, LAYOUT, {RESID_POST_MEAN: "test"}, {})
    manifest = Manifest(
        identity={
            "model": {
                "name": "tiny",
                "revision": None,
                "files": {},
                "dtype": "float32",
                "template_hash": "t",
                "system_policy": "native",
            },
            "personas": {"rows": 30, "conversations": "c"},
            "generate": {},
            "extract": {"pooling": "mean"},
            "store": {"precision": "lossless"},
        },
        layout=LAYOUT,
        tables={
            "roles": [{"id": role, "kind": kind, "description": role} for role, kind in zip(ROLES, KINDS, strict=True)],
            "questions": [{"id": f"q{number}", "text": f"Question {number}?"} for number in range(QUESTIONS)],
        },
        plan={},
        execution={},
    )
    with acquire(folder, timeout=60, say=print) as lease:
        session = {"host": "here", "started": "now", "git_commit": None, "packages": {}}
        write_session(folder, manifest, manifest, session)
        for unit in range(units):
            rows = LAYOUT.unit_row_range(unit)
            dropped = {row: "empty response" for row in rows if row == 7}
            rollouts = encode_rollouts([rollout(row) for row in rows])
            commit(lease.fence, (ROLLOUTS, unit, 0), {rollouts_key(unit): rollouts}, rows=rows, dropped=dropped)
            for group in range(2):
                data = encode_shard(values[LAYOUT.unit_slice(unit), group : group + 1], LAYOUT, "lossless")
                slot = (RESID_POST_MEAN, unit, group)
                commit(lease.fence, slot, {shard_key(*slot): data}, rows=rows, dropped=dropped)
            columns = {
                "role": np.array([ROLES[unit]] * 6, dtype=object),
                "role_id": np.full(6, unit, np.int32),
                "question": np.arange(6, dtype=np.int32),
                "status": np.array([2 if row == 7 else 1 for row in rows], np.uint8),
            }
            objects = {coordinate_key(name, unit): encode_coordinate(x, LAYOUT, name) for name, x in columns.items()}
            commit(lease.fence, (COORDINATES_RECORD, unit, 0), objects, rows=rows, dropped=dropped)
    return values


def rollout(row: int) -> Rollout:
    return Rollout(
        row=row,
        rollout_id=f"{row:016x}",
        role=ROLES[row // 6],
        role_id=row // 6,
        prompt=0,
        question=row % 6,
        sample=0,
        messages=[{"role": "user", "content": f"Question {row % 6}?"}],
        response="" if row == 7 else f"Answer {row}",
        prompt_token_ids=[1],
        response_token_ids=[] if row == 7 else [2],
        finish_reason="stop",
        template_hash="t",
        sampling="{}",
        seed=0,
        dropped="empty response" if row == 7 else None,
    )


def test_axis_vectors_and_positions_are_those_of_the_stored_rollouts(tmp_path: Path) -> None:
    values = write_run(tmp_path / "run").astype(np.float64)
    fit(tmp_path / "run", AnalysisConfig(permutations=20))
    space = open_space(tmp_path / "run")
    means = np.array([np.nanmean(values[6 * role : 6 * role + 6], axis=0) for role in range(5)])
    axis = means[0] - means[1:].mean(axis=0)
    np.testing.assert_allclose(space["axis"], axis, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(space["role_vector"], means[1:], rtol=1e-5, atol=1e-6)
    assert list(space["role"].values) == ROLES[1:]
    assert list(space["role_count"].values) == [5, 6, 6, 6]
    usable = [row for row in range(30) if row != 7]
    assert list(space["rollout_row"].values) == usable
    place = ((values[usable] - means[1:].mean(0)) * axis).sum(2) / (axis**2).sum(1)
    np.testing.assert_allclose(space["rollout_position"], place, rtol=1e-4, atol=1e-5)
    assert (space["cos_axis_pc1"] > 0.99).all()


def test_refit_replaces_the_latest_and_leaves_one_space(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for components in (3, 4):
        fit(tmp_path / "run", AnalysisConfig(permutations=20, components=components))
    assert [path.name for path in sorted((tmp_path / "run" / "space").iterdir())] == ["0002.zarr", "latest"]
    assert open_space(tmp_path / "run").attrs["target_layer"] == 1


def test_half_finished_run_can_be_fitted_and_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "run", units=3)
    fit(tmp_path / "run", AnalysisConfig(permutations=20))
    assert list(open_space(tmp_path / "run")["role"].values) == ["pirate", "ghost"]
    page = publish_report(tmp_path / "run").read_text()
    assert "empty response" in page
    assert open_run(tmp_path / "run")["status"].values.tolist().count(0) == 12


@pytest.mark.parametrize(("units", "message"), [(0, "no extracted rollouts yet"), (2, "1 of `default` and 1 other")])
def test_too_little_to_fit(tmp_path: Path, units: int, message: str) -> None:
    write_run(tmp_path / "run", units=units)
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "run", AnalysisConfig(permutations=20))
    with pytest.raises(InputError, match="no persona space yet; run `fit` first"):
        open_space(tmp_path / "run")


def test_target_layer() -> None:
    assert target_layer(AnalysisConfig(), 30) == 15
    assert target_layer(dataclasses.replace(AnalysisConfig(), target_layer=29), 30) == 29
