"""The report: one harmless, self-contained page, whose charts follow the layer and the search in a real browser."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from personaspace.analysis.pages import charts
from personaspace.analysis.report import figures, measures
from personaspace.analysis.report.render import Completeness, DroppedRollout, Sample
from tests.analysis.browsing import NARROW, WIDE, data_of, scripts_of, text_of, until
from tests.analysis.report.rendered import render
from tests.analysis.spaces import build_space


def test_page_loads_nothing_and_runs_only_its_own_scripts() -> None:
    page = render(build_space())
    markup = re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", page)
    assert not re.search(r"\ssrc=|<(link|iframe|object|embed|base)\b|@import|url\(", markup)
    assert re.findall(r'(\w+) href="(?!#)', markup) == ["a"], "one link to follow, nothing to load"
    assert page.count("* plotly.js v") == 1
    policy = re.findall(r"""http-equiv="Content-Security-Policy" content="(default-src 'none';[^"]*)\"""", markup)[0]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts_of(page)[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert page == render(build_space()), "the page is a pure function of its arguments"


def test_text_from_models_and_catalogues_stays_text() -> None:
    evil = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> \ud83d"
    space = build_space()
    page = render(
        space.assign_coords(role_description=("role", [evil] * space.sizes["role"])),
        title=evil,
        samples={str(role): Sample(system_prompt=evil, question=evil, response=evil) for role in space.role.values},
        provenance=[(evil, evil), ("model", evil)],
        dropped=[DroppedRollout(rollout_id=evil, role=evil, question=evil, reason=evil)],
    )
    assert len(scripts_of(page)) == 3
    assert "<img" not in page.replace(scripts_of(page)[1], "")
    assert [role["name"] for role in data_of(page)["roles"]] == [*space.role.values, "default"]
    assert "<" not in re.sub(r"</?(b|i|br|extra)>", "", json.dumps(data_of(page)["figures"]["PC1 / PC2"]["data"]))
    assert page.encode("utf-8"), "a lone surrogate of a model does not stop the page from being written"


def test_numbers_have_verdicts_and_responses_come_from_both_ends_and_the_middle() -> None:
    space = build_space()
    text = text_of(page := render(space))
    order = [html.escape(role) for role in space.role.values[np.argsort(-space.role_position.sel(layer=15).values)]]
    shown = re.findall(r"<td><strong>(.*?)</strong>", page)
    assert shown == ["default", *order[:3], *order[19:21], *order[-3:]]
    auc, null = (float(space[name].sel(layer=15)) for name in ("kind_auc", "kind_auc_null_p99"))
    assert f"Held-out AUC at layer 15 {auc:.2f} ✓ above the null" in text
    assert f"null {null:.2f} (99th percentile of 200 permutations)" in text
    assert f"above its null at {int((space.kind_auc > space.kind_auc_null_p99).sum())} of 30 layers" in text
    faint = {measure.name: 0.3 * space[measure.name] for measure in measures.MEASURES}
    faint["default_auc_interval"] = 0.3 * space["default_auc_interval"]
    weak = text_of(render(space.assign(faint)))
    assert "not above the null: at this size the axis is not shown to tell professional from fantastical roles" in weak
    assert "not above the null: at this size the order of the roles is not shown to outlast a change" in weak
    assert "not above the null: at this size the direction of PC1 is not evidence" in weak
    assert "✓" not in weak


def test_what_was_not_computed_is_said_and_not_drawn() -> None:
    space = build_space()
    kinds = space.role_kind.str.replace("professional|fantastical", "unknown", regex=True)
    gone = ("kind_auc", "kind_auc_null_p99", "rank_correlation", "rank_correlation_null_p99", "cos_null_p99")
    page = render(space.assign_coords(role_kind=kinds).assign({name: space[name] * np.nan for name in gone}))
    text = text_of(page)
    assert "not available: the catalogue has no roles of the kind professional or fantastical" in text
    assert "not available: it takes at least four questions" in text
    assert "no null was computed, so this number alone is not evidence" in text
    assert {"kind_auc", "rank_correlation"}.isdisjoint(data_of(page)["figures"])
    assert 'id="kind_auc"' not in page


def test_small_and_incomplete_runs_have_a_page_too() -> None:
    space = build_space(components=1).isel(role=slice(0, 2), layer=slice(10, 20))
    dropped = [DroppedRollout(rollout_id=f"r{i}", role="poet", question="Why?", reason="too long") for i in range(203)]
    half = Completeness(rows_planned=40, rows_ok=20, rows_dropped=3, rows_pending=17)
    page = render(space, samples={}, dropped=dropped, completeness=half)
    said = (
        "no response of this role was kept",
        "and 3 more, with their reasons in the run folder",
        "run is not finished",
    )
    assert all(words in page for words in said)
    assert list(data_of(page)["views"]) == ["PC1 / PC2"]
    assert "<p>None.</p>" in render(space, dropped=[])
    space.attrs["target_layer"] = 3
    with pytest.raises(ValueError, match=re.escape("Layer 3 is not in this space. Choose one of its layers: [10, 11")):
        render(space)


def test_every_colour_has_a_counterpart_in_the_dark() -> None:
    space = build_space().assign_coords(role_kind=("role", [f"kind {i % 9}" for i in range(40)]))
    drawn = json.dumps(data_of(render(space))["figures"])
    assert set(re.findall(r"#[0-9a-f]{6}|rgba\([^)]*\)", drawn)) <= set(charts.DARK) | {charts.CLEAR}


def test_many_rollouts_become_quantiles() -> None:
    space = build_space(layers=6, rollouts_per_role=130)
    poet = space.isel(layer=3, rollout=space.rollout_role == "poet").rollout_position
    drawn = np.array(data_of(page := render(space))["quantiles"])[3, :, space.get_index("role").get_loc("poet")]
    assert drawn == pytest.approx(poet.quantile(figures.QUANTILES), abs=0.01)
    assert len(page) < 6e6, "most of it is Plotly"


NO_WEBGL = """const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind) { return kind === "2d" ? get.call(this, kind) : null; };"""


@pytest.mark.browser
@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide", "narrow"])
def test_every_chart_is_drawn_and_fits(open_page: Callable[..., Any], viewport: dict[str, int], scheme: str) -> None:
    tab = open_page(render(build_space()), viewport=viewport, scheme=scheme)
    widths = [box.bounding_box()["width"] for box in tab.locator(".main-svg:first-child").all()]
    assert len(widths) == 11
    assert all(200 < width <= viewport["width"] for width in widths)
    assert tab.locator("#map .points path").count() == 41
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.evaluate("$('map').layout.font.color") == {"light": "#1d2327", "dark": "#e7eaec"}[scheme]
    assert tab.evaluate("window.hacked") is None
    tab.set_viewport_size(NARROW if viewport is WIDE else WIDE)
    until(tab, "Math.abs($('map')._fullLayout.width - $('map').parentElement.clientWidth) < 2")
    until(tab, "$('ranking').clientHeight === D.figures.ranking.layout.height")
    assert {"<script>window.h…", "<script>window.hacked=1</script>"} & set(tab.locator(".ytick").all_text_contents())


@pytest.mark.browser
def test_layer_and_search_move_map_and_ranking_together(open_page: Callable[..., Any]) -> None:
    space = build_space()
    tab = open_page(render(space))
    for layer, key in ((15, "Shift"), (16, "ArrowRight"), (0, "Home")):
        tab.press("#layer", key)
        until(tab, f"$('map').data[0].x[0] === D.score[{layer}][0][0]")
        order = space.role[np.argsort(space.role_position.sel(layer=layer).values)].values
        ticks = tab.evaluate("$('ranking').layout.yaxis.ticktext")
        assert ticks == [*map(charts.label, order), "<b>default</b>"]
        traits = space.trait[np.argsort(space.trait_axis_cosine.sel(layer=layer).values)].values
        assert tab.evaluate("$('traits').layout.yaxis.ticktext") == [*map(charts.label, traits)]
        assert tab.evaluate("$('ranking').data.at(-2).error_x.array")[0] == pytest.approx(
            tab.evaluate("D.reach[at][0][$('ranking').data.at(-2).meta.roles[0]]")
        )
        assert tab.inner_text("#layer-name") == str(layer) + (" (target)" if layer == 15 else "")
    tab.hover("#kind_auc .nsewdrag", position={"x": 100, "y": 60}, force=True)
    tab.wait_for_selector("#kind_auc .hoverlayer .legend")
    tab.click("#kind_auc .nsewdrag", position={"x": 100, "y": 60}, force=True)
    until(tab, "at > 0 && $('layer-name').textContent === String(D.layers[at])")
    tab.click("#to-target")
    assert tab.inner_text("#layer-name") == "15 (target)"
    tab.fill("#search", "POET")
    assert tab.inner_text("#found") == "1 role"
    assert "poet dramatic, 12 rollouts: position" in " ".join(tab.inner_text("#role").split())
    row = list(space.role.values).index("poet")
    until(tab, f"String($('map').data[0].selectedpoints) === '{row}'")
    until(tab, f"$('map').data[0].text[{row}] === 'poet'")
    assert len(tab.evaluate("$('ranking').layout.shapes")) == 1
    tab.fill("#search", "no such role")
    assert tab.inner_text("#found") == "no roles"
    assert not tab.is_visible("#role")


@pytest.mark.browser
@pytest.mark.parametrize("before", ["", NO_WEBGL], ids=["", "no-webgl"])
def test_views_of_the_map_with_and_without_webgl(open_page: Callable[..., Any], before: str) -> None:
    tab = open_page(render(build_space()), before=before)
    tab.get_by_label("PC1 / PC3").check()
    until(tab, "$('map').data[0].y[0] === D.score[15][2][0]")
    if tab.get_by_label("3-D").is_disabled():
        assert tab.inner_text("#view-note") == "The 3-D view is off: this browser offers no WebGL."
    else:
        assert not before
        tab.get_by_label("3-D").check()
        tab.wait_for_selector("#map canvas")
    tab.get_by_label("PC1 / PC2").check()
    tab.wait_for_selector("#map .points path >> nth=39")
