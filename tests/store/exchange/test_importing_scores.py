"""Scores of the reference project find the rollouts that they were given for, or are refused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personaspace.store import open_run
from personaspace.store.creation import write_run
from personaspace.store.errors import InputError
from personaspace.store.exchange.import_run import import_assistant_axis
from personaspace.store.exchange.import_scores import import_scores
from personaspace.store.freeze import freeze_run
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.manifest import require_manifest
from personaspace.store.verify import verify
from tests.store import small_runs
from tests.store.exchange.reference_files import key, write_output, write_scores


def judge(source: Path, folder: LocalFolder, name: str = "gpt") -> None:
    import_scores(source, folder, judge=name, say=lambda _: None)


def scores_of(folder: LocalFolder, name: str = "gpt") -> list[Any]:
    score = open_run(folder, scores=name)["score"].values
    return [None if np.isnan(value) else value for value in score]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference files, and a run of them without scores."""
    place = tmp_path_factory.mktemp("bare")
    source = write_output(place / "out")
    shutil.rmtree(source / "scores")
    import_assistant_axis(source, LocalFolder(place / "run"), model="m", unit_rows=4, say=lambda _: None)
    return place


@pytest.fixture
def imported(bare: Path, tmp_path: Path) -> LocalFolder:
    """A copy of the run; the reference files lie beside it."""
    shutil.copytree(bare, tmp_path, dirs_exist_ok=True)
    return LocalFolder(tmp_path / "run")


@pytest.fixture
def own(tmp_path: Path) -> LocalFolder:
    """A run with ids of our own: rows 0 to 3 are `default`, with prompts 0, 1, 0, 1 and questions q0, q1, q2, q0."""
    folder = LocalFolder(tmp_path / "own")
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        small_runs.create(lease.fence)
        small_runs.complete(lease.fence)
    return folder


def test_own_runs_are_scored_by_places(own: LocalFolder, tmp_path: Path) -> None:
    write_scores(tmp_path, "default", {"pos_p1_q1": 3, "default_p0_q0": 1})
    write_scores(tmp_path, "hacker", {"pos_p1_q0": 0})
    judge(tmp_path, own)
    assert scores_of(own) == [1, 3, *[None] * 7, 0, None, None]
    assert verify(own).problems == ()
    assert len(require_manifest(own).sessions) == 2


def test_prompts_of_imported_runs_are_found_by_the_responses(imported: LocalFolder, tmp_path: Path) -> None:
    """`ghost` was asked with its prompts 1 and 3; the run has them as 0 and 1."""
    write_scores(tmp_path / "out", "ghost", {key(3, 40): 2})
    judge(tmp_path / "out", imported)
    assert [row for row, score in enumerate(scores_of(imported)) if score is not None] == [11]
    judge(tmp_path / "out" / "scores", imported, "again")
    assert scores_of(imported, "again")[11] == 2


def test_without_responses_the_prompts_must_be_all_there(imported: LocalFolder, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "ghost.json").write_text(json.dumps({key(3, 40): 2}))
    with pytest.raises(InputError, match=r"ghost\.json: the scores have prompts 3, and the run has 2 of this role"):
        judge(tmp_path / "alone", imported)
    (tmp_path / "alone" / "ghost.json").write_text(json.dumps({key(3, 40): 2, key(1, 5): 0}))
    judge(tmp_path / "alone", imported)
    assert (scores_of(imported)[11], scores_of(imported)[6]) == (2, 0)


def test_scores_of_other_text_are_refused(imported: LocalFolder, tmp_path: Path) -> None:
    file = tmp_path / "out" / "responses" / "ghost.jsonl"
    file.write_text(file.read_text().replace("Answer of ghost to 3, 40", "Another answer"))
    write_scores(tmp_path / "out", "ghost", {key(1, 5): 2})
    judge(tmp_path / "out", imported)
    write_scores(tmp_path / "out", "ghost", {key(3, 40): 2})
    with pytest.raises(InputError, match=r"ghost\.jsonl:6: is not the response that the run has for pos_p3_q40"):
        judge(tmp_path / "out", imported, "other")


def test_what_a_judge_said_stays_and_may_be_added_to(own: LocalFolder, tmp_path: Path) -> None:
    write_scores(tmp_path, "default", {"pos_p0_q0": 1})
    judge(tmp_path, own)
    write_scores(tmp_path, "hacker", {"pos_p1_q0": 0})
    judge(tmp_path, own)
    assert scores_of(own) == [1, *[None] * 8, 0, None, None]
    before = list(own.list("scores"))
    for changed in ({"pos_p0_q0": 2}, {"pos_p0_q0": 1, "pos_p1_q1": 1}):
        write_scores(tmp_path, "default", changed)
        with pytest.raises(InputError, match="'gpt' has scored the rows 0 to 3 already, and otherwise"):
            judge(tmp_path, own)
    assert list(own.list("scores")) == before
    judge(tmp_path, own, "gpt-2")
    assert scores_of(own, "gpt-2")[:2] == [1, 1]


def test_damaged_scores_are_imported_again(own: LocalFolder, tmp_path: Path) -> None:
    write_scores(tmp_path, "default", {"pos_p0_q0": 1})
    judge(tmp_path, own)
    for entry in list(own.list("scores")):
        own.replace(entry.key, b"damaged")
    judge(tmp_path, own)
    assert scores_of(own)[:2] == [1, None]
    assert verify(own).problems == ()


@pytest.mark.parametrize(
    ("role", "entry", "message"),
    [
        ("pirate", {"pos_p0_q0": 1}, "pirate.json: the run has no role 'pirate'; it has default, poet, hacker."),
        ("default", {"pos_p2_q0": 1}, "default.json: pos_p2_q0: the run has no such rollout of role 'default'."),
        ("default", {"pos_p0_q3": 1}, "default.json: pos_p0_q3: the run has no such rollout of role 'default'."),
        ("default", {"neg_p0_q0": 1}, "default.json: neg_p0_q0: the run has no such rollout of role 'default'."),
        ("default", {"pos_p0_q0": 1, "default_p0_q0": 1}, "pos_p0_q0 and default_p0_q0 mean the same rollout;"),
        ("default", {"pos_p0_q0": 4}, "default.json: score of pos_p0_q0 is 4; it must be 0, 1, 2 or 3."),
        ("default", {"../p0_q0": 1}, "default.json: key '../p0_q0' is not of the form"),
        ("default", {}, "scores: its files hold no scores."),
    ],
)
def test_refused_scores(own: LocalFolder, tmp_path: Path, role: str, entry: Mapping[str, int], message: str) -> None:
    write_scores(tmp_path, role, entry)
    before = own.get("run.json")
    with pytest.raises(InputError) as error:
        judge(tmp_path, own)
    assert message in str(error.value)
    assert own.get("run.json") == before
    assert not list(own.list("scores"))


def test_several_samples_of_one_prompt_and_question_are_refused(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "run")
    rows = [replace(row, prompt=0, question=0, sample=row.row) for row in small_runs.planned()]
    with acquire(folder, timeout=60, say=pytest.fail) as lease:
        write_run(lease.fence, None, small_runs.small_manifest(), rows)
    write_scores(tmp_path, "default", {"pos_p0_q0": 1})
    with pytest.raises(InputError, match="the run has several samples of prompt 0 and question 0"):
        judge(tmp_path, folder)


def test_frozen_runs_and_bad_places_are_refused(own: LocalFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is no folder; give one that holds ROLE\.json"):
        judge(tmp_path / "nowhere", own)
    write_scores(tmp_path, "default", {"pos_p0_q0": 1})
    with pytest.raises(InputError, match="'a b'"):
        judge(tmp_path, own, "a b")
    with acquire(own, timeout=60, say=pytest.fail) as lease:
        freeze_run(lease.fence, require_manifest(own))
    with pytest.raises(InputError, match="the run is frozen as"):
        judge(tmp_path, own)
