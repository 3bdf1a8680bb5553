"""Charts over the layers: what they draw is what the space holds."""

import numpy as np
import pytest

from personaspace.analysis.report import figures, layer_figures
from personaspace.analysis.report.measures import MEASURES, describe
from tests.analysis.spaces import TRAITS, build_space


def test_the_overview_has_a_row_for_each_measure_and_marks_both_layers() -> None:
    space = build_space()
    figure = layer_figures.overview(space)
    heat, *marks = figure.data
    assert list(figure.layout.yaxis.ticktext) == [measure.label for measure in MEASURES]
    np.testing.assert_allclose(heat.customdata[3], space["default_auc"], atol=0.006)
    np.testing.assert_allclose(heat.z[0], (space["kind_auc"] - 0.5) / 0.5, atol=0.006)
    assert [(mark.x[0], mark.text[0].strip()) for mark in marks] == [(15, "target"), (18, "suggested")]
    [_, alone] = layer_figures.overview(space.assign_attrs(suggested_layer=15)).data
    assert alone.text[0].strip() == "target, suggested"
    without = space.assign(kind_auc=space["kind_auc"] * np.nan)
    assert "Held-out AUC" not in layer_figures.overview(without).layout.yaxis.ticktext


def test_a_measure_is_drawn_with_its_interval_over_questions_and_its_null() -> None:
    space = build_space()
    figure = layer_figures.evidence(space, MEASURES[0])
    assert figure is not None
    named = {trace.name: trace for trace in figure.data if trace.name}
    assert list(named) == ["null, 99th percentile", "95% interval over questions", "Held-out AUC"]
    high_L = space["kind_auc_interval"].sel(resampled="questions", bound="high")
    np.testing.assert_allclose(named["95% interval over questions"].y, high_L, rtol=1e-3)
    default = layer_figures.evidence(space, MEASURES[3])
    assert default is not None
    assert "null, 99th percentile" not in {trace.name for trace in default.data}


def test_error_bars_reach_from_the_position_to_the_ends_of_the_interval() -> None:
    space = build_space()
    dots = [trace for trace in figures.ranking(space, 15).data if trace.meta["part"] == "dot"]
    interval = space["role_position_interval"].sel(layer=15, resampled="questions")
    for trace in dots[:-1]:
        rows = trace.meta["roles"]
        low, high = (interval.sel(bound=bound).values[rows] for bound in ("low", "high"))
        x = np.array(trace.x)
        np.testing.assert_allclose(x + trace.error_x.array, high, atol=2e-3)
        np.testing.assert_allclose(x - trace.error_x.arrayminus, low, atol=2e-3)
    assert dots[-1].error_x.array == (None,), "default is at 1 by definition"


def test_traits_are_ranked_by_their_cosine() -> None:
    space = build_space()
    figure = figures.trait_ranking(space, 4)
    cosine_T = space["trait_axis_cosine"].sel(layer=4)
    assert list(figure.data[0].x) == pytest.approx(np.sort(cosine_T).tolist(), abs=1e-3)
    assert "&lt;b&gt;formal&lt;/b&gt;" in figure.layout.yaxis.ticktext
    assert len(figure.layout.yaxis.ticktext) == len(TRAITS)


def test_measures_against_chance_say_what_their_interval_holds() -> None:
    space = build_space()
    clear = describe(space, MEASURES[3], 15)
    assert clear.above
    assert "over questions" in clear.null
    assert "over roles" in clear.null
    low = space.assign(default_auc_interval=space["default_auc_interval"] * 0 + 0.4)
    assert describe(low, MEASURES[3], 15).verdict.startswith("the interval holds a coin toss")
    longer = space.assign(length_correlation=space["length_correlation"] * 0 + 0.5)
    assert describe(longer, MEASURES[4], 15).verdict.startswith("longer responses lie nearer to the Assistant; within")
    even = space.assign(length_correlation=space["length_correlation"] * 0)
    assert describe(even, MEASURES[4], 15).verdict.startswith("the axis hardly goes with length")
