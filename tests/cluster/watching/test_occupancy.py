"""How idle the stages of a pipeline are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.cluster.watching.occupancy import Interval, occupancy


def test_equal_stages_that_never_wait() -> None:
    found = occupancy([[(0, 1), (1, 2)], [(1, 2), (2, 3)]])
    assert (found.idle, found.imbalance, found.bubble) == (0, 0, 0)


def test_a_gap_is_a_bubble() -> None:
    found = occupancy([[(0, 1), (2, 3)], [(10, 12)]])
    assert found.idle == found.bubble == pytest.approx((1 / 3 + 0) / 2)
    assert found.imbalance == 0


def test_a_stage_with_less_to_do_waits_without_a_bubble() -> None:
    """The second stage needs half the time of the first."""
    found = occupancy([[(0, 2), (2, 4), (4, 6)], [(2, 3), (4, 5), (6, 7)]])
    assert found.idle == found.imbalance == pytest.approx((0 + 2 / 5) / 2)
    assert found.bubble == 0


def test_a_stage_without_work_has_no_share() -> None:
    with pytest.raises(ValueError, match="no forward pass of stage 1"):
        occupancy([[(0, 1)], []])


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 9)), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_shares_lie_within_bounds(stages: list[list[tuple[float, float]]]) -> None:
    """(Gap, length) of each pass."""
    passes: list[list[Interval]] = []
    for own in stages:
        time, found = 0.0, []
        for gap, length in own:
            found.append((time + gap, time + gap + length))
            time += gap + length
        passes.append(found)
    found = occupancy(passes)
    assert -1e-9 <= found.bubble <= found.idle < 1
    assert 0 <= found.imbalance <= found.idle + 1e-9
