"""The comparison's page: harmless, complete without scripts, and alive in a real browser."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from personaspace.analysis.compare.comparison import MEASURES, compare
from personaspace.analysis.compare.pairing import Fitted
from personaspace.analysis.compare.report import MARK, Beside, Source, render_comparison
from personaspace.analysis.compare.runs import open_runs
from personaspace.analysis.pages import charts
from personaspace.analysis.report.render import Sample
from personaspace.store.local import LocalFolder
from tests.analysis.browsing import NARROW, WIDE, data_of, scripts_of, text_of, until
from tests.analysis.compare.twin_runs import write_fitted

EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1> \ud83d"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Fitted]:
    """Two of one basis, of which the second has another ghost, and a third that is deeper and wider."""
    root = tmp_path_factory.mktemp("runs")
    folders = [LocalFolder(root / name) for name in ("base", "instruct", "deep")]
    write_fitted(folders[0], layers=6)
    write_fitted(folders[1], layers=6, say="Yes", moved={"ghost": 6.0})
    write_fitted(folders[2], layers=9, basis=2, hidden=24)
    return [run.fitted for run in open_runs(folders)]


def render(runs: Sequence[Fitted], *, text: str = "Ah, a stubborn ear! ", **changes: Any) -> str:
    sources = [
        Source(
            run=run,
            samples={
                str(role): Sample(system_prompt=f"Be a {role}. {text}", question=f"Why? {text}", response=text * 30)
                for role in run.space["role"].values
            },
            provenance=[("Run", f"runs/{run.name} {text}")],
        )
        for run in runs
    ]
    settings: dict[str, Any] = {
        "differences": [("model.template_hash", '"t"', f'"u" {text}')],
        "basis": "same",
    } | changes
    pairs = [Beside(pair=pair, **settings) for pair in compare(runs, layer=3, permutations=30)]
    return render_comparison(sources, pairs)


def test_page_loads_nothing_and_runs_only_its_own_scripts(runs: list[Fitted]) -> None:
    page = render(runs)
    markup = re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", page)
    assert not re.search(r"\ssrc=|<(link|iframe|object|embed|base)\b|@import|url\(", markup)
    assert page.count("* plotly.js v") == 1
    policy = re.findall(r"""http-equiv="Content-Security-Policy" content="(default-src 'none';[^"]*)\"""", markup)[0]
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts_of(page)[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert MARK in page[:4096]
    assert page == render(runs), "the page is a pure function of its arguments"
    drawn = json.dumps([pair["figures"] for pair in data_of(page)["pairs"]])
    assert set(re.findall(r"#[0-9a-f]{6}|rgba\([^)]*\)", drawn)) <= set(charts.DARK) | {charts.CLEAR}


def test_text_from_models_and_catalogues_stays_text(runs: list[Fitted]) -> None:
    evil = [
        Fitted(
            name=f"{number} {EVIL}",
            depth=run.depth,
            space=run.space.assign_coords(
                role=[f"{role} {EVIL[:-1]}" for role in run.space["role"].values],
                role_kind=("role", [f"{kind} {EVIL[:-1]}" for kind in run.space["role_kind"].values]),
            ),
            identity={"model": {"name": EVIL}},
        )
        for number, run in enumerate(runs)
    ]
    page = render(evil, text=EVIL, differences=[(EVIL, EVIL, EVIL)], basis="different")
    assert len(scripts_of(page)) == 3
    assert "<img" not in page.replace(scripts_of(page)[1], "")
    for pair in data_of(page)["pairs"]:
        assert "<" not in re.sub(r"</?(b|i|br|extra)>", "", json.dumps(pair["figures"]))
    assert page.encode("utf-8"), "a lone surrogate of a model does not stop the page from being written"


def test_two_runs_are_told_in_words(runs: list[Fitted]) -> None:
    page = render(runs[:2])
    text = text_of(page)
    assert "base and instruct, compared" in text
    assert "base at layer 3 beside instruct at layer 3, over the 12 roles that both have." in text
    assert "These are few: with 12 roles much looks alike by chance" in text
    assert "Both read the same weight files" in text
    assert "✓ above chance, and beyond what the kinds of roles explain" in text
    assert 'model.template_hash "t" "u" Ah' in text.replace("&#34;", '"')
    assert "1 of 12 differ by more than the others do" in text
    assert re.search(r"ghost ✓ fantastical -?\d\.\d\d → \d\.\d\d, \+\d\.\d\d ± \d\.\d\d rank \d+ → \d", text)
    assert 'id="matrices"' not in page
    assert data_of(page)["pairs"][0]["at"] == 3


def test_other_bases_widths_and_equal_settings_are_told(runs: list[Fitted]) -> None:
    text = text_of(render(runs[:2], basis="different", differences=[]))
    assert "The weight files differ. Cosines between the two mean something only if" in text
    assert "Nothing that decides the numbers" in text
    text = text_of(render(runs[::2], basis="unknown"))
    assert "have 16 and 24 dimensions, so directions can't be compared" in html.unescape(text)
    assert "The models have 6 and 9 layers" in text
    assert "not available: the widths differ" in text
    assert "The runs don't record which weights they read" in html.unescape(text_of(render(runs[:2], basis="unknown")))


def test_more_runs_have_a_matrix_for_each_measure(runs: list[Fitted]) -> None:
    page = render(runs)
    text = text_of(page)
    assert "3 runs: base, instruct, deep, compared" in text
    section = text_of(page.split('id="matrices"')[1].split("</section>")[0])
    assert all(measure.label.replace("'", "&#39;") in section for measure in MEASURES)
    assert [pair["runs"] for pair in data_of(page)["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    assert page.count('data-pair="2"') == 4
    assert len(page) < 6e6, "most of it is Plotly"


@pytest.mark.browser
@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide", "narrow"])
def test_every_chart_is_drawn_and_fits(
    open_page: Callable[..., Any],
    runs: list[Fitted],
    viewport: dict[str, int],
    scheme: str,
) -> None:
    tab = open_page(render(runs[:2]), viewport=viewport, scheme=scheme)
    widths = [box.bounding_box()["width"] for box in tab.locator(".main-svg:first-child").all()]
    assert len(widths) == 2 + len(MEASURES)
    assert all(200 < width <= viewport["width"] for width in widths)
    assert tab.locator("#scatter .points path").count() == 13
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.evaluate("$('scatter').layout.font.color") == {"light": "#1d2327", "dark": "#e7eaec"}[scheme]
    tab.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    until(tab, f"$('scatter').layout.font.color === '{ {'light': '#e7eaec', 'dark': '#1d2327'}[scheme] }'")


@pytest.mark.browser
def test_search_hover_click_and_layer(open_page: Callable[..., Any], runs: list[Fitted]) -> None:
    tab = open_page(render(runs[:2]))
    assert tab.inner_text("#layer-name") == "3 (findings)"
    assert not tab.is_visible("#role")
    tab.fill("#search", "GHOST")
    assert tab.inner_text("#found") == "1 role"
    assert "so nearer to the Assistant by" in tab.inner_text("#role-place")
    assert tab.inner_text("#said-1-run") == "instruct"
    assert "Ah, a stubborn ear!" in tab.inner_text("#said-0-response")
    row = [role["name"] for role in tab.evaluate("pair().roles")].index("ghost")
    until(tab, f"String($('scatter').data[1].selectedpoints) === '{row}'")
    until(tab, f"$('scatter').data[1].text[{row}] === 'ghost'")
    before = tab.inner_text("#role-place")
    tab.press("#layer", "ArrowRight")
    until(tab, "$('scatter').data[1].x[0] === pair().position[0][4][0]")
    assert tab.inner_text("#layer-name") == "4"
    assert tab.inner_text("#role-place") != before
    tab.click("#to-target")
    assert tab.inner_text("#layer-name") == "3 (findings)"
    tab.fill("#search", "nobody")
    assert tab.inner_text("#found") == "no roles"
    tab.fill("#search", "")
    mark = tab.locator("#scatter .points path").nth(row)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    at = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.move(*at)
    tab.wait_for_selector("#scatter .hoverlayer .hovertext")
    assert "ghost" in tab.text_content("#scatter .hoverlayer .hovertext")
    tab.mouse.click(*at)
    until(tab, "$('search').value === 'ghost'")
    tab.hover("#cka .nsewdrag", position={"x": 100, "y": 60}, force=True)
    tab.wait_for_selector("#cka .hoverlayer .legend")
    tab.click("#cka .nsewdrag", position={"x": 100, "y": 60}, force=True)
    until(tab, "at === 1 && $('layer-name').textContent === '1'")


@pytest.mark.browser
def test_another_pair_changes_texts_and_charts(open_page: Callable[..., Any], runs: list[Fitted]) -> None:
    tab = open_page(render(runs))
    assert "over the 12 roles" in tab.inner_text("#findings")
    tab.select_option("#pair", label="instruct and deep")
    until(tab, "$('scatter').layout.yaxis.title.text === 'position in deep'")
    assert "instruct at layer 3 beside deep at layer 5" in tab.inner_text("#findings")
    assert "base" not in tab.inner_text("#findings")
    assert not tab.is_visible("#axis_cosine")
    assert tab.inner_text("#layer-name") == "3 and 5 (findings)"
    tab.select_option("#pair", label="base and instruct")
    until(tab, "$('axis_cosine').getBoundingClientRect().width > 200")
