import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis.agreement import Agreement, RunAgreement, agree, describe_agreement

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def judges(pairs: list[tuple[int, int]]) -> Agreement:
    first, second = (np.array(scores, dtype=np.float32) for scores in zip(*pairs, strict=True))
    return agree(first, second)


def test_kappa_of_a_known_table() -> None:
    # 20 and 15 agree of 50; by chance 25 would: (0.7 - 0.5) / (1 - 0.5).
    pairs = [(0, 0)] * 20 + [(0, 1)] * 5 + [(1, 0)] * 10 + [(1, 1)] * 15
    found = judges(pairs)
    assert found.share == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    assert found.difference == pytest.approx(-0.1)


def test_far_disagreements_count_more_with_weights() -> None:
    near = judges([(0, 0), (1, 1), (2, 2), (3, 3), (2, 3)])
    far = judges([(0, 0), (1, 1), (2, 2), (3, 3), (0, 3)])
    assert near.share == far.share
    assert near.weighted_kappa is not None
    assert far.weighted_kappa is not None
    assert far.weighted_kappa < near.weighted_kappa
    assert (near.within_one, far.within_one) == (1.0, 0.8)


@given(PAIRS)
def test_agreement_is_the_same_either_way_round(pairs: list[tuple[int, int]]) -> None:
    there, back = judges(pairs), judges([(b, a) for a, b in pairs])
    assert there.share == back.share
    assert there.difference == pytest.approx(-back.difference)
    for one, other in ((there.kappa, back.kappa), (there.weighted_kappa, back.weighted_kappa)):
        assert one == other or one == pytest.approx(other)


@given(PAIRS)
def test_kappa_is_one_only_where_all_agree(pairs: list[tuple[int, int]]) -> None:
    found = judges(pairs)
    scores = {score for pair in pairs for score in pair}
    assert (found.kappa is None) == (len(scores) == 1)
    if found.kappa is not None:
        assert (found.kappa == pytest.approx(1)) == (found.share == 1)


def test_the_description_names_the_roles_that_differ_most_first() -> None:
    whole, half = judges([(0, 0), (3, 3)]), judges([(0, 0), (3, 2)])
    run = RunAgreement(
        first="a",
        second="b",
        only_first=1,
        only_second=2,
        all=judges([(0, 0), (3, 3), (0, 0), (3, 2)]),
        confusion=((2, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 1, 1)),
        roles={"agreed": whole, "disputed": half},
    )
    text = describe_agreement(run)
    assert "4 rollouts scored by both (only a: 1, only b: 2)" in text
    assert "same score: 75.0%, at most one apart: 100.0%" in text
    assert text.index("disputed") < text.index("agreed")
