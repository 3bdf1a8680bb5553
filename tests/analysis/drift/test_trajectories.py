"""Trajectories: planted ways are found again, measured as said, and refused where run and space don't fit together."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from personaspace.analysis.drift.trajectories import movements, trajectories
from personaspace.store.errors import InputError
from tests.analysis.drift.talks import a_space, some_talks, spans_of

NAN = float("nan")
WAYS = [[1.0, 0.9, 0.4, 0.7, 0.2, 0.1], [1.2, NAN, 1.6, 1.0], [0.3, 0.6]]


@settings(max_examples=25, deadline=None)
@given(
    ways=st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=9), min_size=1, max_size=6),
    first_row=st.integers(0, 1000),
)
def test_planted_positions_and_scores_are_found(ways: list[list[float]], first_row: int) -> None:
    space, turns = a_space(), [len(way) for way in ways]
    scores = np.random.default_rng(0).normal(size=(sum(turns), 4))
    drift = trajectories(spans_of(ways, space, scores, first_row), space)
    assert drift["conversation"].values.tolist() == [first_row + row for row in range(len(ways))]
    place = 0
    for row, way in enumerate(ways):
        own = drift.isel(conversation=row)
        expected = np.repeat(np.array(way)[:, None], 4, axis=1)
        np.testing.assert_allclose(own["position"].values[: len(way)], expected, atol=1e-9)
        np.testing.assert_allclose(own["score"].values[: len(way), 2], scores[place : place + len(way), :3], atol=1e-9)
        assert np.isnan(own["position"].values[len(way) :]).all()
        np.testing.assert_allclose(own["drift"].values, way[-1] - way[0], atol=1e-9)
        place += len(way)


def test_what_is_measured_of_a_conversation() -> None:
    drift = trajectories(spans_of(WAYS, a_space()), a_space())
    low, high = drift["default_position"].sel(layer=2).values
    assert (low, high) == pytest.approx((0.55, 1.45))
    assert drift["default_score"].values[1, 2] == pytest.approx([-0.9, 0.9])
    at = drift.sel(layer=2)
    assert at["turns"].values.tolist() == [6, 3, 2]
    assert at["tokens"].values[1].tolist() == [10, 0, 12, 13, 0, 0]
    assert at["below"].values.tolist() == [3, 0, 1]
    assert at["above"].values.tolist() == [0, 1, 0]
    assert at["first_below"].values.tolist() == [2, -1, 0]
    assert at["drift"].values == pytest.approx([-0.9, -0.2, 0.3])
    assert drift.attrs["default_count"] == 400
    assert drift.attrs["array"] == "resid_post_mean"


@pytest.mark.parametrize("turns", [4, 5, 8, 15, 40])
def test_slopes_are_those_of_scipy(turns: int) -> None:
    generator = np.random.default_rng(turns)
    ways = generator.normal(size=(3, turns))
    ways[1, turns // 2] = NAN
    drift = trajectories(spans_of(ways.tolist(), a_space()), a_space()).sel(layer=1)
    for row, way in enumerate(ways):
        turn_T = np.flatnonzero(~np.isnan(way))
        if len(turn_T) < 4:
            assert np.isnan(drift["slope_interval"].values[row]).all()
            continue
        expected = stats.theilslopes(way[turn_T], turn_T)
        assert float(drift["slope"][row]) == pytest.approx(expected.slope)
        low, high = drift["slope_interval"].values[row]
        assert (low, high) == pytest.approx((expected.low_slope, expected.high_slope))


def test_few_turns_have_a_slope_without_an_interval() -> None:
    drift = trajectories(spans_of([[1.0, 0.5], [1.0, 0.5, 0.3]], a_space()), a_space()).sel(layer=0)
    assert drift["slope"].values == pytest.approx([-0.5, -0.35])
    assert np.isnan(drift["slope_interval"].values).all()


def test_single_turns_and_parts_of_turns_are_left_out() -> None:
    spans = spans_of([[1.0], *WAYS], a_space())
    think = spans.assign_coords(part=("span", np.array(["think"] * spans.sizes["span"], dtype=object)))
    drift = trajectories(xr.concat([spans, think], dim="span"), a_space())
    assert drift["conversation"].values.tolist() == [1, 2, 3]
    np.testing.assert_allclose(drift["position"].values[0, :, 3], WAYS[0], atol=1e-9)


def test_layers_are_those_of_both_or_those_asked_for() -> None:
    spans, space = spans_of(WAYS, a_space()), a_space()
    both = trajectories(spans.sel(layer=[1, 2, 3]), space.sel(layer=[0, 1, 2]))
    assert both["layer"].values.tolist() == [1, 2]
    assert trajectories(spans, space, layers=[3])["layer"].values.tolist() == [3]
    with pytest.raises(
        InputError, match=r"^runs/talks: layer 7: not in both the turns and the space; they share 0 to 3\."
    ):
        trajectories(spans, space, layers=[7])
    with pytest.raises(InputError, match="no layer is in both the turns and the space; they share none"):
        trajectories(spans.sel(layer=[3]), space.sel(layer=[0]))


def refused(spans: xr.Dataset, space: xr.Dataset) -> str:
    with pytest.raises(InputError) as error:
        trajectories(spans, space)
    return str(error.value)


def test_what_does_not_fit_together_is_refused() -> None:
    spans, space = spans_of(WAYS, a_space()), a_space()
    other: dict[str, Any] = space.attrs | {"array": "resid_post_last_prompt"}
    assert refused(spans, space.assign_attrs(other)) == (
        "runs/talks: has turns of resid_post_mean; the space is of resid_post_last_prompt."
    )
    assert refused(spans.isel(hidden=slice(8)), space).startswith(
        "runs/talks: turns of 8 dimensions, and a space of 24"
    )
    assert "no conversation of two turns or more" in refused(spans_of([[1.0], [0.5]], space), space)
    assert "no position of a `default` rollout" in refused(spans, space.isel(rollout=slice(100)))


def test_movements_are_means_over_conversations() -> None:
    drift, _ = some_talks(count=12)
    together, coding, therapy, philosophy = movements(drift, 2)
    assert [one.name for one in (together, coding, therapy, philosophy)] == ["all", "coding", "therapy", "philosophy"]
    assert (together.conversations, therapy.conversations) == (12, 4)
    drift_C = drift["drift"].sel(layer=2).values[1::3]
    assert therapy.drift == pytest.approx(drift_C.mean())
    own = stats.ttest_1samp(drift_C, 0).confidence_interval()
    assert therapy.drift_interval == pytest.approx((own.low, own.high))
    assert therapy.drift_interval[1] < -1 < coding.drift_interval[0] < 0 < coding.drift_interval[1]
    assert (therapy.first_below, therapy.left) == (0, 4)
    below = drift["position"].sel(layer=2).values < float(drift["default_position"].sel(layer=2, bound="low"))
    assert together.later_below == pytest.approx(below[:, 1:].mean())


def test_a_start_below_the_range_is_no_departure() -> None:
    drift = trajectories(spans_of(WAYS, a_space()), a_space())
    [together] = movements(drift, 0)
    assert together.first_below == pytest.approx(1 / 3)
    assert together.later_below == pytest.approx(3 / 8)
    assert together.left == 1
    [one] = movements(drift.isel(conversation=[0]), 0)
    assert np.isnan(one.drift_interval).all()
