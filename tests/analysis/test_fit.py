"""The fit step on a run in the store, written through the store's own commits."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit, target_layer
from personaspace.analysis.report.publish import publish_report
from personaspace.store import open_run
from personaspace.store.commit import commit
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError
from personaspace.store.layout import Layout, coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import Manifest
from personaspace.store.plan import PlannedRow
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS
from personaspace.store.rollouts import Rollout, encode_rollouts
from personaspace.store.schema import RESID_POST_MEAN, ArraySpec, encode_coordinate, encode_shard
from personaspace.store.space import open_space

ROLES = ["default", "pirate", "ghost", "doctor", "lawyer"]
KINDS = ["assistant", "dramatic", "fantastical", "professional", "professional"]
QUESTIONS = 6
LAYOUT = Layout(segments=(30,), layers=2, hidden=8, unit_rows=6, layer_group=1)


def write(
    folder: LocalFolder, units: int = 5, *, second_layer_units: int = 5, responses: dict[int, str] | None = None
) -> np.ndarray:
    """A run of five roles with six answers each; row 7 (pirate) is dropped. Returns its values ``(30, 2, 8)``.

    The first ``units`` are complete, but for the second layer, which ``second_layer_units`` of them have.
    ``responses``: row -> another response.
    """
    generator = np.random.default_rng(0)
    place = np.repeat([3.0, -2.0, -3.0, 1.0, 2.0], QUESTIONS)
    values = (place[:, None, None] * np.eye(8)[0] + 0.1 * generator.normal(size=(30, 2, 8))).astype(np.float32)
    values[7] = np.nan
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
            "generate": {},
            "extract": {"pooling": "mean"},
            "store": {"precision": "lossless"},
        },
        layout=LAYOUT,
        arrays=(ArraySpec(name=RESID_POST_MEAN, description="test"),),
        tables={
            "roles": [{"id": role, "kind": kind, "description": role} for role, kind in zip(ROLES, KINDS, strict=True)],
            "questions": [{"id": f"q{number}", "text": f"Question {number}?"} for number in range(QUESTIONS)],
        },
        plan=(),
        unit_order=tuple(range(5)),
        execution={},
        sessions=({"epoch": 1, "host": "here", "started": "now", "git_commit": None, "packages": {}},),
    )
    planned = [
        PlannedRow(row=row, rollout_id=f"{row:016x}", role_id=row // 6, prompt=0, question=row % 6, sample=0)
        for row in range(30)
    ]
    with acquire(folder, timeout=60, say=print) as lease:
        write_run(lease.fence, None, manifest, planned)
        for unit in range(units):
            rows = LAYOUT.unit_row_range(unit)
            dropped = {row: "empty response" for row in rows if row == 7}
            rollouts = encode_rollouts([rollout(row, (responses or {}).get(row)) for row in rows])
            commit(lease.fence, (ROLLOUTS, unit, 0), {rollouts_key(unit): rollouts}, rows=rows, dropped=dropped)
            for group in range(2 if unit < second_layer_units else 1):
                data = encode_shard(values[LAYOUT.unit_slice(unit), group : group + 1], LAYOUT, "lossless")
                slot = (RESID_POST_MEAN, unit, group)
                commit(lease.fence, slot, {shard_key(*slot): data}, rows=rows, dropped=dropped)
            columns = {
                "role": np.array([ROLES[unit]] * 6, dtype=object),
                "role_id": np.full(6, unit, np.int32),
                "prompt": np.zeros(6, np.int32),
                "question": np.arange(6, dtype=np.int32),
                "sample": np.zeros(6, np.int32),
                "n_tokens": np.ones(6, np.int32),
                "status": np.array([2 if row == 7 else 1 for row in rows], np.uint8),
            }
            objects = {coordinate_key(name, unit): encode_coordinate(x, LAYOUT, name) for name, x in columns.items()}
            commit(lease.fence, (COORDINATES_RECORD, unit, 0), objects, rows=rows, dropped=dropped)
    return values


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "run")


def rollout(row: int, response: str | None = None) -> Rollout:
    return Rollout(
        row=row,
        rollout_id=f"{row:016x}",
        role=ROLES[row // 6],
        role_id=row // 6,
        prompt=0,
        question=row % 6,
        sample=0,
        messages=[{"role": "user", "content": f"Question {row % 6}?"}],
        response="" if row == 7 else response or f"Answer {row}",
        prompt_token_ids=[1],
        response_token_ids=[] if row == 7 else [2],
        finish_reason="stop",
        template_hash="t",
        sampling="{}",
        seed=0,
        dropped="empty response" if row == 7 else None,
    )


def test_axis_vectors_and_positions_are_those_of_the_stored_rollouts(folder: LocalFolder) -> None:
    values = write(folder).astype(np.float64)
    fit(folder, AnalysisConfig(permutations=20))
    space = open_space(folder)
    means = np.array([np.nanmean(values[6 * role : 6 * role + 6], axis=0) for role in range(5)])
    axis = means[0] - means[1:].mean(axis=0)
    np.testing.assert_allclose(space["axis"], axis, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(space["role_vector"], means[1:], rtol=1e-5, atol=1e-6)
    assert list(space["role"].values) == ROLES[1:]
    assert list(space["role_count"].values) == [5, 6, 6, 6]
    usable = [row for row in range(30) if row != 7]
    assert list(space["rollout_row"].values) == usable
    assert list(space["rollout_role"].values) == [ROLES[row // 6] for row in usable]
    place = ((values[usable] - means[1:].mean(0)) * axis).sum(2) / (axis**2).sum(1)
    np.testing.assert_allclose(space["rollout_position"], place, rtol=1e-4, atol=1e-5)
    assert (space["cos_axis_pc1"] > 0.99).all()


def test_refit_replaces_the_latest_and_leaves_one_space(folder: LocalFolder) -> None:
    write(folder)
    for components in (2, 3):
        fit(folder, AnalysisConfig(permutations=20, components=components))
    names = sorted(path.name for path in (folder.path / "space").iterdir())
    assert len(names) == 2
    assert names[0].startswith("0002-")
    assert names[1] == "latest.json"
    assert json.loads((folder.path / "space" / "latest.json").read_text())["name"] == names[0]
    assert open_space(folder).attrs["target_layer"] == 1
    assert open_space(folder).sizes["component"] == 3


def test_half_finished_run_can_be_fitted_and_reported(folder: LocalFolder) -> None:
    write(folder, units=3)
    fit(folder, AnalysisConfig(permutations=20))
    assert list(open_space(folder)["role"].values) == ["pirate", "ghost"]
    where = publish_report(folder)
    assert where == f"{folder.url}/report.html"
    page = Path(where).read_text()
    assert "empty response" in page
    assert "Answer 12" in page
    assert open_run(folder)["status"].values.tolist().count(0) == 12


def test_only_layers_that_every_rollout_has_are_fitted(folder: LocalFolder) -> None:
    """Layers are being added to a run: some units have the new one already."""
    write(folder, second_layer_units=4)
    space = fit(folder, AnalysisConfig(permutations=20))
    assert space["layer"].values.tolist() == [0]
    assert space.attrs["target_layer"] == 0
    assert np.isfinite(space["role_vector"].values).all()
    with pytest.raises(InputError, match=r"^analysis\.target_layer: 1; the run has layers 0 to 0\.$"):
        fit(folder, AnalysisConfig(permutations=20, target_layer=1))


def test_flawed_rollouts_are_left_out_on_demand_only(folder: LocalFolder) -> None:
    refusal, loop = "I'm sorry, but I can't help with that.", "the door to " * 20
    values = write(folder, responses={8: refusal, 12: loop, 13: refusal}).astype(np.float64)
    space = fit(folder, AnalysisConfig(permutations=20))
    assert space.sizes["rollout"] == 29
    assert (space.attrs["leave_out"], space.attrs["left_out_count"]) == ("", 0)
    page = Path(publish_report(folder)).read_text()
    assert "The fit leaves out none of them." in page
    assert "7% (2-21%) begin with a refusal: 2" in page

    space = fit(folder, AnalysisConfig(permutations=20, leave_out=("refused", "empty")))
    assert [row for row in range(30) if row not in space["rollout_row"].values] == [7, 8, 13]
    assert (space.attrs["leave_out"], space.attrs["left_out_count"]) == ("refused, empty", 2), (
        "row 7 was dropped before"
    )
    assert space["role_count"].values.tolist() == [4, 5, 6, 6]
    np.testing.assert_allclose(space["role_vector"][0], values[[6, 9, 10, 11]].mean(0), rtol=1e-5, atol=1e-6)
    assert "The fit leaves out 2 of them (refused, empty)." in Path(publish_report(folder)).read_text()


def test_nothing_is_left_to_fit(folder: LocalFolder) -> None:
    write(folder, responses=dict.fromkeys(range(30), "I'm sorry, but I can't help with that."))
    message = r"^analysis\.leave_out: leaves none of the 29 extracted rollouts; `personaspace quality .*run`"
    with pytest.raises(InputError, match=message):
        fit(folder, AnalysisConfig(permutations=20, leave_out=("refused",)))


@pytest.mark.parametrize(("units", "default", "others"), [(1, 1, 0), (2, 1, 1)])
def test_too_little_to_fit(folder: LocalFolder, units: int, default: int, others: int) -> None:
    write(folder, units=units)
    message = (
        f"{folder.url}: {default} of `default` and {others} other roles have usable rollouts; the axis needs "
        "`default` and at least two roles. Let extraction go on, then fit again."
    )
    with pytest.raises(InputError) as error:
        fit(folder, AnalysisConfig(permutations=20))
    assert str(error.value) == message
    with pytest.raises(InputError, match="no persona space yet; run `fit` first"):
        open_space(folder)
    with pytest.raises(InputError, match="no persona space yet; run `fit` first"):
        publish_report(folder)


def test_nothing_to_fit(folder: LocalFolder) -> None:
    write(folder, units=0)
    with pytest.raises(InputError, match=r"run: no extracted rollouts yet; run `extract` first\.$"):
        fit(folder, AnalysisConfig(permutations=20))


def test_no_run_to_fit(folder: LocalFolder) -> None:
    with pytest.raises(InputError, match=r"no run here \(no run\.json\)"):
        fit(folder, AnalysisConfig())


def test_target_layer() -> None:
    assert target_layer(AnalysisConfig(), range(30)) == 15
    assert target_layer(dataclasses.replace(AnalysisConfig(), target_layer=29), range(30)) == 29
    assert target_layer(AnalysisConfig(), [0, 1, 10, 11]) == 10
    assert target_layer(AnalysisConfig(), []) == 0
    message = r"^analysis\.target_layer: 5; the run has layers 0 to 1, 10 to 12\.$"
    with pytest.raises(InputError, match=message):
        target_layer(dataclasses.replace(AnalysisConfig(), target_layer=5), [0, 1, 10, 11, 12])
