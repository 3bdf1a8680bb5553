"""The report: one harmless, self-contained page, whose charts follow the layer and the search in a real browser."""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import sync_playwright

from personaspace.analysis import charts, figures
from personaspace.analysis.report import Completeness, DroppedRollout, Sample, render_report

KINDS = {
    "professional": "consultant teacher lawyer engineer librarian nurse analyst editor accountant scientist",
    "everyday": "neighbour gardener grandmother student commuter cook tourist barista",
    "dramatic": "detective pirate gladiator diva rebel jester hacker poet spy",
    "fantastical": "ghost dragon oracle wizard vampire leviathan golem <script>window.hacked=1</script>",
    "abstract": "river silence swarm entropy <img/src=x/onerror=window.hacked=1>",
}
QUESTION = "What should I do about a friend who never listens to my advice?"


def build_space(layers: int = 30, rollouts_per_role: int = 12, components: int = 10) -> xr.Dataset:
    """A space such as a small model gives: kinds line up along the axis, more clearly in the middle layers."""
    rng = np.random.default_rng(7)
    kind_of = {role: kind for kind, roles in KINDS.items() for role in roles.split()}
    roles, L, R, K, T = list(kind_of), layers, len(kind_of), components, np.dtypes.StringDType()
    strength_L = 0.25 + 0.75 * np.exp(-(((np.arange(L) - 0.6 * L) / (0.3 * L)) ** 2))
    level_R = np.array([0.8 - 0.4 * list(KINDS).index(kind) for kind in kind_of.values()]) + rng.normal(0, 0.2, R)
    position_RL = (level_R - level_R.mean())[:, None] * strength_L + rng.normal(0, 0.1, (R, L))
    position_NL = np.vstack([position_RL, np.ones(L)]).repeat(rollouts_per_role, axis=0)
    score_RLK = rng.normal(size=(R, L, K)) * 6 / np.sqrt(1 + np.arange(K))
    score_RLK[..., 0] += 12 * position_RL
    variance_LK = score_RLK.var(axis=0)
    data: dict[str, Any] = {
        "axis": (("layer", "hidden"), rng.normal(size=(L, 48))),
        "explained_variance_ratio": (("layer", "component"), variance_LK / variance_LK.sum(1, keepdims=True)),
        "role_score": (("role", "layer", "component"), score_RLK),
        "default_score": (("layer", "component"), 20 * strength_L[:, None] / (1 + np.arange(K)) ** 2),
        "role_position": (("role", "layer"), position_RL),
        "rollout_position": (("rollout", "layer"), position_NL + rng.normal(0, 0.3, position_NL.shape)),
    }
    noise_L = 0.04 * rng.random(L)
    measures = {"cos_axis_pc1": 0.9 * strength_L, "cos_null_p99": 0.7 + noise_L, "cos_random_p99": 0.1 + noise_L}
    measures |= {"rank_correlation": 0.85 * strength_L, "rank_correlation_null_p99": 0.36 + noise_L}
    measures |= {"auc": 0.5 + 0.46 * strength_L, "auc_null_p99": 0.68 + noise_L}
    data |= {name: ("layer", value_L) for name, value_L in measures.items()}
    coords = {
        "role": np.array(roles, T),
        "role_kind": ("role", np.array(list(kind_of.values()), T)),
        "role_description": ("role", np.array([f"You are a {role}; never break character & co." for role in roles], T)),
        "role_count": ("role", np.full(R, rollouts_per_role)),
        "layer": np.arange(L),
        "rollout_role": ("rollout", np.array([*roles, "default"], T).repeat(rollouts_per_role)),
    }
    attrs: dict[str, Any] = {"target_layer": L // 2, "default_count": rollouts_per_role, "null_permutations": 200}
    attrs |= {"positive_kind": "professional", "negative_kind": "fantastical"}
    return xr.Dataset(data, coords, attrs).astype(dict.fromkeys(data, np.float32))


def render(space: xr.Dataset, **changes: Any) -> str:
    """The report with everyday texts around the dataset."""
    answer = "Ah, 'tis a stubborn ear they have! \"Listen\", I'd say, and then say nothing at all for a while. " * 4
    samples = {"default": Sample(system_prompt="", question=QUESTION, response="Here are three steps.")}
    for role in space.role.values:
        samples[str(role)] = Sample(system_prompt=f"You are a {role}.", question=QUESTION, response=f"{answer} {role}")
    usual: dict[str, Any] = {
        "title": "Persona space of SmolLM2-135M-Instruct",
        "samples": samples,
        "provenance": [("Model", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("Identity hash", "sha256:" + "3b" * 32)],
        "dropped": [DroppedRollout(rollout_id="9f2c11aa", role="poet", question=QUESTION, reason="empty response")],
        "completeness": Completeness(rows_planned=492, rows_ok=491, rows_dropped=1, rows_pending=0),
    }
    return render_report(space, **(usual | changes))


def scripts_of(page: str) -> list[str]:
    """The data, Plotly and the page's own script, cut as a browser cuts them: at the first end tag."""
    return re.findall(r"(?s)<script[^>]*>(.*?)</script>", page)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script draws from."""
    return dict(json.loads(scripts_of(page)[0]))


def text_of(page: str) -> str:
    """The page without scripts, style and tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", page)))


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
    auc, null = (float(space[name].sel(layer=15)) for name in ("auc", "auc_null_p99"))
    assert f"Held-out AUC at layer 15 {auc:.2f} ✓ above the null" in text
    assert f"null {null:.2f} (99th percentile of 200 permutations)" in text
    assert f"above its null at {int((space.auc > space.auc_null_p99).sum())} of 30 layers" in text
    faint = {measure.name: 0.3 * space[measure.name] for measure in figures.MEASURES}
    weak = text_of(render(space.assign(faint)))
    assert "not above the null: at this size the axis is not shown to tell professional from fantastical roles" in weak
    assert "not above the null: at this size the order of the roles is not shown to outlast a change" in weak
    assert "not above the null: at this size the direction of PC1 is not evidence" in weak
    assert "✓" not in weak


def test_what_was_not_computed_is_said_and_not_drawn() -> None:
    space = build_space()
    kinds = space.role_kind.str.replace("professional|fantastical", "unknown", regex=True)
    gone = ("auc", "auc_null_p99", "rank_correlation", "rank_correlation_null_p99", "cos_null_p99")
    page = render(space.assign_coords(role_kind=kinds).assign({name: space[name] * np.nan for name in gone}))
    text = text_of(page)
    assert "not available: the catalogue has no roles of the kind professional or fantastical" in text
    assert "not available: it takes at least four questions" in text
    assert "no null was computed, so this number alone is not evidence" in text
    assert {"auc", "rank_correlation"}.isdisjoint(data_of(page)["figures"])
    assert 'id="auc"' not in page


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


CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync"]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
NO_WEBGL = """const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind) { return kind === "2d" ? get.call(this, kind) : null; };"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium; skips loudly where there is none."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        stop = pytest.fail if os.environ.get("PERSONASPACE_REQUIRE_BROWSER") == "1" else pytest.skip
        stop("NO BROWSER: nobody looked at the report. Run `apt-get install chromium`.")
    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=CHROMIUM)


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a report from a file, and fails on any error in the console or request to the network."""
    problems: list[str] = []

    def open_(page: str, viewport: dict[str, int] = WIDE, scheme: str = "light", before: str = "") -> Any:
        (tmp_path / "report.html").write_text(page, encoding="utf-8")
        tab = browser.new_page(viewport=viewport, color_scheme=scheme)
        tab.add_init_script(before)
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        tab.goto((tmp_path / "report.html").as_uri())
        tab.wait_for_selector("body[data-ready]", timeout=60_000)
        return tab

    yield open_
    assert problems == []


def until(tab: Any, truth: str) -> None:
    """Waits for a condition by asking from outside: the page's policy forbids Playwright's own polling."""
    deadline = time.monotonic() + 20
    while not tab.evaluate(truth):
        assert time.monotonic() < deadline, truth
        tab.wait_for_timeout(50)


@pytest.mark.browser
@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide", "narrow"])
def test_every_chart_is_drawn_and_fits(open_page: Callable[..., Any], viewport: dict[str, int], scheme: str) -> None:
    tab = open_page(render(build_space()), viewport=viewport, scheme=scheme)
    widths = [box.bounding_box()["width"] for box in tab.locator(".main-svg:first-child").all()]
    assert len(widths) == 7
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
        assert tab.inner_text("#layer-name") == str(layer) + (" (target)" if layer == 15 else "")
    tab.hover("#auc .nsewdrag", position={"x": 100, "y": 60}, force=True)
    tab.wait_for_selector("#auc .hoverlayer .legend")
    tab.click("#auc .nsewdrag", position={"x": 100, "y": 60}, force=True)
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
