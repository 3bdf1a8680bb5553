"""Wilson intervals against published and brute-force values, and who stands out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from personaspace.analysis.quality.shares import Share, stand_out, wilson


@given(st.integers(1, 400), st.data())
def test_interval_is_that_of_scipy(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    theirs = binomtest(count, total).proportion_ci(method="wilson")
    low, high = Share(count=count, total=total).interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert 0 <= low <= count / total <= high <= 1


def test_share_of_nothing() -> None:
    assert Share(count=0, total=0).share == 0
    assert Share(count=0, total=0).interval == (0, 1)


@given(st.integers(1, 200), st.data())
def test_more_rollouts_narrow_the_interval(total: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, total))
    low, high = wilson(np.array([count, 10 * count]), np.array([total, 10 * total]))
    assert high[1] - low[1] < high[0] - low[0]


def test_one_bad_role_stands_out_and_its_neighbours_do_not() -> None:
    count, total = np.full(276, 2), np.full(276, 100)
    count[17] = 20
    assert np.flatnonzero(stand_out(count, total)).tolist() == [17]


def test_nobody_stands_out_where_all_are_alike() -> None:
    assert not stand_out(np.full(50, 97), np.full(50, 100)).any()
    assert not stand_out(np.array([1] + [0] * 49), np.full(50, 24)).any(), "one rollout is an accident"
    assert not stand_out(np.array([5]), np.array([5])).any(), "there is nobody to compare with"
    assert not stand_out(np.zeros(0, int), np.zeros(0, int)).any()


def test_chance_alone_seldom_names_a_role() -> None:
    draws = np.random.default_rng(0).binomial(24, 0.05, size=(300, 276))
    named = np.mean([stand_out(count, np.full(276, 24)).any() for count in draws])
    assert named <= 0.03, "stated: 1%"
