"""Scores of judges: joined by row, one judge at a time, and never lost to one damaged copy."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personaspace.store import open_run, select
from personaspace.store.errors import InputError, IntegrityError, LeaseError
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.records import committed_slots, copy_key, read_record
from personaspace.store.scores import (
    Score,
    commit_scores,
    judges,
    read_scores,
    restore_scores,
    scores_key,
    scores_slot,
)
from tests.store.small_runs import LAYOUT, complete, create

JUDGE = "gpt-4.1-mini_v2"


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        create(lease.fence)
        yield lease.fence


def give(fence: Fence, judge: str, scores: dict[int, float], generation: int = 0) -> None:
    """Commit scores of one unit."""
    [unit] = {row // LAYOUT.unit_rows for row in scores}
    made = [Score(row=row, score=score, reason=f"It is {score}.") for row, score in scores.items()]
    commit_scores(fence, LAYOUT, judge, unit, made, generation=generation)


def read(fence: Fence, judge: str | None = None) -> list[float | None]:
    """Score of every row, None where there is none."""
    scores = read_scores(fence.folder, LAYOUT, committed_slots(fence.folder), judge)
    assert scores is not None
    assert scores.dtype == np.float32
    return [None if np.isnan(score) else float(score) for score in scores]


def test_scores_lie_at_their_rows(fence: Fence) -> None:
    assert read_scores(fence.folder, LAYOUT, committed_slots(fence.folder)) is None
    give(fence, JUDGE, {9: 3.0, 8: 0.0})
    give(fence, JUDGE, {1: 2.0})
    assert read(fence) == read(fence, JUDGE) == [None, 2.0, *[None] * 6, 0.0, 3.0, None, None]


@given(given_scores=st.dictionaries(st.integers(0, 9), st.sampled_from([0.0, 1.0, 2.0, 3.0, 1.5]), min_size=1))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_scores(tmp_path_factory: pytest.TempPathFactory, given_scores: dict[int, float]) -> None:
    with acquire(LocalFolder(tmp_path_factory.mktemp("run")), timeout=60, say=pytest.fail) as lease:
        for unit in {row // 4 for row in given_scores}:
            give(lease.fence, JUDGE, {row: score for row, score in given_scores.items() if row // 4 == unit})
        assert read(lease.fence) == [given_scores.get(row) for row in range(12)]


def test_reasons_are_kept(fence: Fence) -> None:
    give(fence, JUDGE, {4: 2.0})
    table = pq.read_table(Path(fence.folder.url) / scores_key(JUDGE, 1))
    assert table.to_pylist() == [{"row": 4, "score": 2.0, "reason": "It is 2.0."}]


def test_several_judges_are_kept_apart(fence: Fence) -> None:
    give(fence, "a", {0: 1.0})
    give(fence, "a.b", {0: 2.0, 1: 3.0})
    assert judges(committed_slots(fence.folder)) == ["a", "a.b"]
    assert read(fence, "a")[:2] == [1.0, None]
    assert read(fence, "a.b")[:2] == [2.0, 3.0]
    assert read_scores(fence.folder, LAYOUT, committed_slots(fence.folder)) is None


def test_an_unknown_judge_is_refused(fence: Fence) -> None:
    with pytest.raises(InputError, match=r": no scores of 'c'\. Judges with scores: none\.$"):
        read_scores(fence.folder, LAYOUT, committed_slots(fence.folder), "c")
    give(fence, "b", {0: 1.0})
    give(fence, "a", {0: 1.0})
    message = f"{fence.folder.url}: no scores of 'c'. Judges with scores: a, b."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read_scores(fence.folder, LAYOUT, committed_slots(fence.folder), "c")


@pytest.mark.parametrize("judge", ["../x", "a/b", "", ".hidden", "a b"])
def test_a_judge_whose_name_could_leave_the_folder_is_refused(fence: Fence, judge: str) -> None:
    before = sorted(entry.key for entry in fence.folder.list())
    for call in (scores_key, scores_slot):
        message = f"judge: {judge!r} is no name; use letters, digits, '.', '_' and '-', first a letter or digit."
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            call(judge, 0)
    with pytest.raises(InputError, match="use letters, digits"):
        give(fence, judge, {0: 1.0})
    assert sorted(entry.key for entry in fence.folder.list()) == before


def test_scores_are_kept_twice_and_recorded(fence: Fence) -> None:
    give(fence, JUDGE, {4: 2.0})
    key = scores_key(JUDGE, 1)
    assert fence.folder.get(key) == fence.folder.get(copy_key(key))
    record = read_record(fence.folder, scores_slot(JUDGE, 1), 0)
    assert [stored.key for stored in record.objects] == [key, copy_key(key)]
    assert record.rows == (4, 8)


def test_the_highest_generation_counts(fence: Fence) -> None:
    give(fence, JUDGE, {4: 2.0, 5: 1.0})
    give(fence, JUDGE, {4: 3.0}, generation=1)
    assert read(fence)[4:6] == [3.0, None]


def test_damaged_scores_are_an_error_and_not_none(fence: Fence) -> None:
    give(fence, JUDGE, {4: 2.0})
    key = scores_key(JUDGE, 1)
    fence.folder.replace(key, fence.folder.get(key)[:-1])
    with pytest.raises(IntegrityError, match=re.escape(f"{fence.folder.url}/{key}: ")):
        read_scores(fence.folder, LAYOUT, committed_slots(fence.folder))


@pytest.mark.parametrize("damaged", ["first", "copy"])
@pytest.mark.parametrize("loss", ["cut", "gone"])
def test_one_sound_copy_is_enough(fence: Fence, damaged: str, loss: str) -> None:
    give(fence, JUDGE, {4: 2.0})
    key = scores_key(JUDGE, 1)
    whole = fence.folder.get(key)
    lost = key if damaged == "first" else copy_key(key)
    fence.folder.replace(lost, whole[:-1]) if loss == "cut" else fence.folder.delete(lost)
    assert restore_scores(fence, LAYOUT, scores_slot(JUDGE, 1), 0)
    assert fence.folder.get(key) == fence.folder.get(copy_key(key)) == whole
    assert read(fence)[4] == 2.0


def test_scores_without_a_sound_record_are_recorded_again(fence: Fence) -> None:
    give(fence, JUDGE, {4: 2.0})
    slot = scores_slot(JUDGE, 1)
    record = read_record(fence.folder, slot, 0)
    fence.folder.replace(record.key, b"damaged")
    assert restore_scores(fence, LAYOUT, slot, 0)
    assert committed_slots(fence.folder)[slot] == 1
    assert read(fence)[4] == 2.0
    fence.folder.delete(record.key)
    fence.folder.delete(read_record(fence.folder, slot, 1).key)
    assert restore_scores(fence, LAYOUT, slot, -1)
    assert read(fence)[4] == 2.0


def test_scores_without_a_sound_copy_are_lost(fence: Fence) -> None:
    give(fence, JUDGE, {4: 2.0})
    key = scores_key(JUDGE, 1)
    for lost in (key, copy_key(key)):
        fence.folder.replace(lost, fence.folder.get(lost)[:-1])
    assert not restore_scores(fence, LAYOUT, scores_slot(JUDGE, 1), 0)
    with pytest.raises(IntegrityError, match="differ from their record"):
        read_scores(fence.folder, LAYOUT, committed_slots(fence.folder))


def test_a_fenced_out_judge_scores_nothing(fence: Fence) -> None:
    with pytest.raises(LeaseError, match="lease epoch 0 has ended"):
        give(Fence(fence.folder, 0), JUDGE, {4: 2.0})
    assert read_scores(fence.folder, LAYOUT, committed_slots(fence.folder)) is None


def test_open_run_joins_the_only_judge_or_the_one_named(fence: Fence) -> None:
    complete(fence)
    assert "score" not in open_run(fence.folder).coords
    assert open_run(fence.folder).attrs["scores"] == "none"
    with pytest.raises(InputError, match=r"^score: the run has none\. Import or judge first, or name the judge: open_"):
        select(open_run(fence.folder), score=3)
    give(fence, "a", {0: 3.0, 1: 0.0})
    assert open_run(fence.folder)["score"].values[:2].tolist() == [3.0, 0.0]
    give(fence, "b", {0: 0.0})
    give(fence, "b", {4: 3.0})
    assert "score" not in open_run(fence.folder).coords
    run = open_run(fence.folder, scores="b")
    assert np.isnan(run["score"].values[1])
    assert run.attrs["scores"] == "a, b"
    assert select(run, score=3).sizes["rollout"] == 1
    assert select(run, score=3)["rollout_id"].values.tolist() == [f"{4:016x}"]
    assert select(run, score=[0, 3])["rollout_id"].values.tolist() == [f"{0:016x}", f"{4:016x}"]
    with pytest.raises(InputError, match=r"^score: 2 is not in this run\. It has 0\.0, 3\.0\.$"):
        select(run, score=2)
    with pytest.raises(InputError, match=r"no scores of 'c'\. Judges with scores: a, b\.$"):
        open_run(fence.folder, scores="c")
