"""Ranges of layers to cap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.analysis.caps.ranges import (
    check_ranges,
    parse_range,
    range_id,
    suggested_ranges,
    sweep_ranges,
    written,
)
from personaspace.store.errors import InputError


def test_people_write_both_ends_and_ids_leave_the_stop_out() -> None:
    assert parse_range("46-53") == range(46, 54)
    assert range_id(range(46, 54)) == "46:54"
    assert (written(range(46, 54)), written(range(7, 8))) == ("46-53", "7")
    assert parse_range("7") == range(7, 8)


@pytest.mark.parametrize("text", ["53-46", "46:54", "a-b", "-3", "", "46-"])
def test_refused_ranges(text: str) -> None:
    with pytest.raises(InputError, match=f"caps --layers: '{text}'; give first and last layer, such as 46-53"):
        parse_range(text)


def test_ranges_that_the_fit_lacks_or_that_come_twice() -> None:
    check_ranges([range(2, 4), range(3, 5)], [2, 3, 4])
    with pytest.raises(InputError, match="caps --layers: 3-6; the fit has no layer 5, only 2 to 4"):
        check_ranges([range(3, 7)], [2, 3, 4])
    with pytest.raises(InputError, match="caps --layers: 2-3 is given twice; give each range once"):
        check_ranges([range(2, 4), range(2, 4)], [2, 3, 4])


def test_the_papers_ranges_at_the_papers_depths() -> None:
    assert suggested_ranges(64)[0] == range(46, 54)
    assert suggested_ranges(80)[1] == range(56, 72)
    assert suggested_ranges(30) == (range(22, 26), range(21, 27))


def test_the_sweep_at_qwens_depth_is_that_of_the_reference_project() -> None:
    windows = sweep_ranges(64)
    assert len(windows) == 31  # with four percentiles: the 124 experiments of its published config
    assert [range_id(window) for window in windows[:2]] == ["32:36", "34:38"]
    assert {len(window) for window in windows} == {4, 8, 16}
    assert range(46, 54) in windows
    assert windows[-1] == range(44, 60)


@given(st.integers(1, 200))
def test_suggestions_lie_in_the_model(depth: int) -> None:
    for windows in (suggested_ranges(depth), sweep_ranges(depth)):
        assert len(set(windows)) == len(windows)
        assert all(len(window) and window.start >= 0 and window.stop <= depth for window in windows)
    assert suggested_ranges(depth)
