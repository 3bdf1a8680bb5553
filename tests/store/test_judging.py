"""What a judge at work keeps in the store, and what a crash makes of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.store.commit import publish
from personaspace.store.errors import IntegrityError, LeaseError
from personaspace.store.judging import (
    Answer,
    Ledger,
    Spending,
    drop_answers,
    ledger_key,
    read_answers,
    read_ledger,
    write_answers,
    write_ledger,
)
from personaspace.store.lease import Fence, acquire
from personaspace.store.local import LocalFolder
from personaspace.store.scores import Score, commit_scores, read_judgements, restore_scores, scores_key, scores_slot
from personaspace.store.verify import verify
from tests.store.small_runs import LAYOUT, create

ABOUT = {"model": "a model", "instructions_hash": "0123"}


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Fence]:
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        create(lease.fence)
        yield lease.fence


def score(row: int) -> Score:
    return Score(row=row, score=float(row % 4), reason="so")


def test_what_a_judge_says_of_a_unit_comes_back(fence: Fence) -> None:
    commit_scores(fence, LAYOUT, "judge", 1, [score(4), score(6)], unjudged={5: "nonsense"}, about=ABOUT)
    judgement = read_judgements(fence.folder, "judge")[1]
    assert dict(judgement.scores) == {4: score(4), 6: score(6)}
    assert judgement.unjudged == {5: "nonsense"}
    assert judgement.about == ABOUT
    assert judgement.generation == 0
    assert read_judgements(fence.folder, "judge", [0, 2]) == {}


def test_a_crash_before_the_record_of_a_later_generation_leaves_the_earlier_one_whole(fence: Fence) -> None:
    commit_scores(fence, LAYOUT, "judge", 1, [score(4)], about=ABOUT)
    publish(fence, scores_key("judge", 1, 1), b"half of it")
    assert read_judgements(fence.folder, "judge")[1].scores == {4: score(4)}
    assert verify(fence.folder, own_epoch=fence.epoch).harmful == []
    commit_scores(fence, LAYOUT, "judge", 1, [score(4), score(5)], about=ABOUT, generation=1)
    assert read_judgements(fence.folder, "judge")[1].scores == {4: score(4), 5: score(5)}
    assert verify(fence.folder, own_epoch=fence.epoch).problems == ()


@pytest.mark.parametrize("lost", ["object", "record"])
def test_a_later_generation_is_restored_from_its_copy_with_all_it_says(fence: Fence, lost: str) -> None:
    commit_scores(fence, LAYOUT, "judge", 1, [score(4)], about=ABOUT)
    commit_scores(fence, LAYOUT, "judge", 1, [score(4), score(5)], unjudged={6: "no"}, about=ABOUT, generation=1)
    key = scores_key("judge", 1, 1) if lost == "object" else "commits/000001/scores.judge.000.001.json"
    fence.folder.replace(key, b"damaged")
    assert restore_scores(fence, LAYOUT, scores_slot("judge", 1), 1)
    judgement = read_judgements(fence.folder, "judge")[1]
    assert dict(judgement.scores) == {4: score(4), 5: score(5)}
    assert judgement.unjudged == {6: "no"}
    assert judgement.about == ABOUT


@given(
    st.lists(
        st.builds(
            Answer,
            row=st.integers(0, 10**9),
            score=st.none() | st.sampled_from([0.0, 1.0, 2.25, 3.0]),
            reason=st.none() | st.text(),
        ),
        max_size=5,
    )
)
def test_answers_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, answers: list[Answer]) -> None:
    with acquire(LocalFolder(tmp_path_factory.mktemp("run")), timeout=60, say=pytest.fail) as lease:
        key = write_answers(lease.fence, "judge", 3, answers)
        assert read_answers(lease.fence.folder, "judge") == {key: answers}
        drop_answers(lease.fence, [key])
        assert read_answers(lease.fence.folder, "judge") == {}


def test_a_damaged_part_counts_for_nothing_and_harms_nobody(fence: Fence) -> None:
    good = write_answers(fence, "judge", 0, [Answer(row=1, score=2.0)])
    bad = write_answers(fence, "judge", 1, [Answer(row=2, score=2.0)])
    fence.folder.replace(bad, b"damaged")
    assert read_answers(fence.folder, "judge") == {good: [Answer(row=1, score=2.0)], bad: []}
    assert verify(fence.folder, own_epoch=fence.epoch).problems == ()


def test_a_ledger_says_what_sessions_may_have_spent(fence: Fence) -> None:
    assert read_ledger(fence.folder, "judge") is None
    ended = Spending(requests=3, prompt_tokens=10, completion_tokens=2, usd=0.5, models={"a model": 3})
    killed = Spending(requests=1, usd=0.1, granted_usd=0.75)
    ledger = Ledger(about=ABOUT).with_session(2, ended).with_session(10, killed)
    write_ledger(fence, "judge", ledger)
    stored = read_ledger(fence.folder, "judge")
    assert stored == ledger
    assert stored.usd(before=11) == 1.25
    assert stored.usd(before=10) == 0.5
    fence.folder.replace(ledger_key("judge"), b"{}")
    with pytest.raises(IntegrityError, match=r"ledger.json: is damaged, so it is not known what the judge has spent."):
        read_ledger(fence.folder, "judge")


def test_who_lost_the_lease_keeps_nothing(fence: Fence) -> None:
    late = Fence(fence.folder, fence.epoch - 1)
    for work in (
        lambda: write_answers(late, "judge", 0, [Answer(row=1, score=1.0)]),
        lambda: write_ledger(late, "judge", Ledger(about=ABOUT)),
        lambda: drop_answers(late, ["judging/judge/000001-000000.parquet"]),
    ):
        with pytest.raises(LeaseError, match=r"lease epoch 0 has ended"):
            work()
    assert list(fence.folder.list("judging")) == []
