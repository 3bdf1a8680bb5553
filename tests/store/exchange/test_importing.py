"""What the reference project has extracted becomes a run like any other, whole or not at all."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import fit
from personaspace.analysis.report.publish import publish_report
from personaspace.extract.personas import plan_imported
from personaspace.store import open_run
from personaspace.store.catalog import summarize
from personaspace.store.errors import IdentityError, LeaseError
from personaspace.store.layout import coordinate_key, rollouts_key, shard_key
from personaspace.store.lease import LEASE, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import read_manifest, require_manifest
from personaspace.store.plan import read_plan
from personaspace.store.records import record_key
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.store.exchange.reference_files import (
    HIDDEN,
    LAYERS,
    PROMPTS,
    QUESTIONS,
    activations,
    import_all,
    key,
    response,
    responses,
    scores,
    write_output,
    write_role,
)


def expected() -> np.ndarray:
    """Rows in the order of the responses, `default` first."""
    return np.stack([tensor.float().numpy() for role in PROMPTS for tensor in activations(role).values()])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output(tmp_path_factory.mktemp("source") / "out")


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalFolder:
    folder = LocalFolder(tmp_path_factory.mktemp("imported") / "run")
    import_all(source, folder)
    return folder


def test_imported_run_holds_every_value(imported: LocalFolder) -> None:
    run = open_run(imported)
    assert run.sizes == {"rollout": 20, "layer": LAYERS, "hidden": HIDDEN}
    np.testing.assert_array_equal(run[RESID_POST_MEAN].values[:18], expected())  # bfloat16 fits into 16 bits
    assert run["status"].values.tolist() == [1] * 18 + [3] * 2
    assert run["role"].values.tolist() == ["default"] * 6 + ["ghost"] * 6 + ["poet"] * 6 + [""] * 2
    assert run["question_id"].values[:6].tolist() == ["aa5", "aa17", "aa40"] * 2
    assert run["prompt"].values[6:12].tolist() == [0, 0, 0, 1, 1, 1]
    assert run["score"].values[:18].tolist() == [score for role in PROMPTS for score in scores(role).values()]
    assert not run["n_tokens"].values.any()


def test_imported_run_is_whole(imported: LocalFolder, source: Path) -> None:
    summary = summarize(imported)
    assert (summary.state, summary.generated, summary.extracted) == ("complete", 18, 18)
    assert (summary.model, summary.judges) == ("org/model", ("assistant-axis",))
    assert verify(imported).problems == ()
    manifest = require_manifest(imported)
    assert manifest.execution == {"imported_from": str(source)}
    assert manifest.identity["model"]["imported"]
    assert len(manifest.identity["extract"]["imported"]["sha256"]) == 64


def test_rollouts_and_their_ids_are_those_of_a_plan_of_the_same_responses(imported: LocalFolder, source: Path) -> None:
    plan = plan_imported(source / "responses")
    assert [row.rollout_id for row in read_plan(imported, require_manifest(imported))] == [
        row.rollout_id for row in plan.rows
    ]
    tables = require_manifest(imported).tables
    assert [(role["id"], tuple(role["prompts"])) for role in tables["roles"]] == [
        (role.id, role.prompts) for role in plan.roles
    ]
    assert [(question["id"], question["text"]) for question in tables["questions"]] == [
        (question.id, question.text) for question in plan.questions
    ]
    stored = read_rollouts(imported).to_pylist()
    for entry, row in zip(stored, plan.rows, strict=True):
        assert (entry["messages"], entry["response"]) == (list(row.messages), row.response)
        assert (entry["prompt"], entry["question"], entry["rollout_id"]) == (row.prompt, row.question, row.rollout_id)
        assert (entry["finish_reason"], entry["response_token_ids"]) == ("imported", [])


def test_imported_run_can_be_fitted_and_reported(imported: LocalFolder) -> None:
    space = fit(imported, AnalysisConfig(permutations=5, components=2, unfiltered=True))
    means = [expected()[start : start + 6].astype(np.float64).mean(axis=0) for start in (0, 6, 12)]
    np.testing.assert_allclose(space["axis"], means[0] - (means[1] + means[2]) / 2, atol=1e-6)
    publish_report(imported)
    page = imported.get("report.html").decode()
    assert "org/model" in page
    assert "as in the imported files" in page


def test_without_default_no_axis_is_promised(tmp_path: Path) -> None:
    source = write_output(tmp_path / "out", ["ghost", "poet"])
    said: list[str] = []
    import_all(source, LocalFolder(tmp_path / "run"), say=said.append)
    assert f"{source}: there is no role `default`; the run can be read and exported, but no axis can be fitted" in said


def test_folded_system_prompts_are_kept(tmp_path: Path) -> None:
    """Gemma has no system turn: the conversation begins with the user's, and only the field has the prompt."""
    folded = response(
        "ghost",
        1,
        5,
        conversation=[{"role": "user", "content": "Be a ghost. Hm?"}, responses("ghost")[0]["conversation"][-1]],
    )
    write_role(tmp_path / "out", "ghost", [folded], {key(1, 5): torch.ones(2, 3)})
    folder = LocalFolder(tmp_path / "run")
    import_all(tmp_path / "out", folder)
    assert require_manifest(folder).tables["roles"][0]["prompts"] == ["You are ghost, 1."]
    assert read_rollouts(folder).to_pylist()[0]["messages"] == [{"role": "user", "content": "Be a ghost. Hm?"}]


class Full(Exception):
    """What the storage says at the n-th write."""


@dataclass(frozen=True, slots=True)
class FailingFolder(LocalFolder):
    """Fails once: at write number ``writes`` of objects that aren't the lease."""

    writes: list[int]

    def _count(self, key: str) -> None:
        if key != LEASE:
            self.writes[0] -= 1
            if self.writes[0] == 0:
                raise Full

    def put_new(self, key: str, data: bytes) -> bool:
        self._count(key)
        return LocalFolder.put_new(self, key, data)

    def replace(self, key: str, data: bytes) -> None:
        self._count(key)
        LocalFolder.replace(self, key, data)


def contents(folder: LocalFolder) -> dict[str, bytes]:
    """Objects that say the same in every run."""
    return {
        entry.key: folder.get(entry.key)
        for entry in folder.list()
        if entry.key.startswith(("activations.zarr/", "rollouts/", "scores/", "plan/"))
    }


@pytest.fixture(scope="module")
def writes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a whole import."""
    counter = [0]
    import_all(source, FailingFolder(tmp_path_factory.mktemp("counted") / "run", counter))
    return -counter[0]


@pytest.mark.parametrize("part", range(12))
def test_import_goes_on_after_a_crash(
    source: Path, imported: LocalFolder, writes: int, tmp_path: Path, part: int
) -> None:
    path = tmp_path / "run"
    with pytest.raises(Full):
        import_all(source, FailingFolder(path, [1 + part * (writes - 1) // 11]))  # The first, ..., the last write.
    import_all(source, LocalFolder(path))
    assert contents(LocalFolder(path)) == contents(imported)
    assert verify(LocalFolder(path)).problems == ()


def test_an_import_that_is_complete_writes_no_data_again(source: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    import_all(source, folder)
    before = {entry.key: entry.modified for entry in folder.list() if "run" not in entry.key}
    import_all(source, folder)
    after = {entry.key: entry.modified for entry in folder.list() if "run" not in entry.key}
    assert {key for key in before | after if before.get(key) != after.get(key)} == {LEASE, ".lock"}
    assert len(require_manifest(folder).sessions) == 2


def test_what_is_damaged_is_imported_again_on_demand(source: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    import_all(source, folder)
    good = contents(folder)
    damaged = {
        shard_key(RESID_POST_MEAN, 0, 1): b"damaged",
        rollouts_key(1): b"",
        coordinate_key("status", 2): good[coordinate_key("status", 2)][:-1],
        record_key((RESID_POST_MEAN, 4, 0), 0): b"{}",
    }
    for key_, data in damaged.items():
        folder.replace(key_, data)
    folder.delete(shard_key(RESID_POST_MEAN, 3, 0))
    import_all(source, folder)
    assert len(verify(folder).harmful) == 5
    import_all(source, folder, repair=True)
    assert verify(folder).problems == ()
    assert contents(folder) == good
    import_all(source, folder)
    assert verify(folder).problems == ()


def test_another_source_is_another_run(source: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    import_all(write_output(tmp_path / "out"), folder)
    tensors = activations("ghost")
    tensors[key(1, 5)] += 1
    write_role(tmp_path / "out", "ghost", responses("ghost"), tensors)
    before = folder.get("run.json")
    with pytest.raises(IdentityError, match=r"extract\.imported\.sha256: "):
        import_all(tmp_path / "out", folder)
    with pytest.raises(IdentityError, match=r'model\.name: "org/model" -> "other"'):
        import_all(source, folder, model="other")
    assert folder.get("run.json") == before


def test_a_run_in_use_is_left_alone(source: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    with acquire(folder, timeout=60, say=pytest.fail), pytest.raises(LeaseError, match="is being written by"):
        import_all(source, folder)
    assert read_manifest(folder) is None


def test_questions_are_placed_by_their_numbers(imported: LocalFolder) -> None:
    assert [question["id"] for question in require_manifest(imported).tables["questions"]] == [
        f"aa{number}" for number in QUESTIONS
    ]
