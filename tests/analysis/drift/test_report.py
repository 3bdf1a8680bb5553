"""The page of drift: one harmless file, whose charts and tables follow layer, domain and conversation in a browser."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from personaspace.analysis.drift.report import ANSWERED, MARKER, SHOWN, choose, render_drift
from personaspace.analysis.pages import charts
from tests.analysis.browsing import NARROW, WIDE, data_of, scripts_of, text_of, until
from tests.analysis.drift.talks import EVIL, some_talks

TITLE = "Persona drift of SmolLM2-135M-Instruct"


def render(**sizes: int) -> str:
    drift, talks = some_talks(**sizes)
    return render_drift(drift, talks, title=TITLE)


def test_page_loads_nothing_and_runs_only_its_own_scripts() -> None:
    page = render()
    markup = re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", page)
    assert not re.search(r"\ssrc=|<(link|iframe|object|embed|base)\b|@import|url\(", markup)
    assert "default-src 'none'" in markup
    assert len(re.findall(r"'sha256-[^']+'", markup)) == len(scripts_of(page)) - 1 == 2
    assert MARKER in page[:4096]
    assert page == render(), "the page is a pure function of its arguments"


def test_what_was_said_stays_text() -> None:
    drift, talks = some_talks()
    names = {name: ("conversation", [EVIL + str(row) for row in range(9)]) for name in ("scenario", "topic", "domain")}
    evil = {
        row: replace(talk, system=EVIL, written_by=EVIL, turns=dict.fromkeys(talk.turns, (EVIL, EVIL)))
        for row, talk in talks.items()
    }
    page = render_drift(drift.assign_coords(names), evil, title=EVIL)
    assert len(scripts_of(page)) == 3
    assert "<img" not in page.replace(scripts_of(page)[1], "")
    assert "<" not in re.sub(r"</?(b|i|br|extra)>", "", json.dumps(data_of(page)["figures"]["ways"]["data"]))
    assert page.encode("utf-8")


def test_numbers_at_the_target_are_said_in_words() -> None:
    text = text_of(render(count=12))
    assert "Mean drift at layer 2, last turn less first" in text
    assert re.search(r"95% interval -0\.\d\d to -0\.\d\d over conversations", text)
    assert re.search(r"First turns below the default range 0% 5% of the default rollouts are", text)
    assert "4 of 12 conversations leave the range after their first turn" in text
    assert "The answers are the model's own." in text


def test_foreign_answers_and_another_template_are_said() -> None:
    drift, talks = some_talks()
    drift.attrs["notes"] = ['template_hash: "a" -> "b"']
    foreign = {row: replace(talk, written_by="meta-llama/Llama-3.3-70B-Instruct") for row, talk in talks.items()}
    text = text_of(render_drift(drift, foreign, title=TITLE))
    assert "were written by meta-llama/Llama-3.3-70B-Instruct and read by SmolLM2-135M-Instruct" in text
    assert "template_hash" in text


def test_one_conversation_has_a_page_too() -> None:
    drift, talks = some_talks(count=1, turns=2, layers=3)
    text = text_of(render_drift(drift, talks, title=TITLE))
    assert "one conversation: no interval" in text
    assert "mean of a domain" not in text


def test_of_many_conversations_the_extremes_and_an_even_choice_are_shown() -> None:
    drift, talks = some_talks(count=300)
    chosen = choose(drift)
    assert len(chosen) == SHOWN
    size_C = np.abs(drift["drift"].sel(layer=2).values)
    assert set(np.argsort(-size_C)[:40].tolist()) <= set(chosen)
    assert np.median(size_C[chosen]) > np.median(size_C)
    page = render_drift(drift, {row: talks[row] for row in chosen}, title=TITLE)
    assert "180 more conversations are in the numbers" in text_of(page)
    assert len(page) < 7e6


def test_every_colour_has_a_counterpart_in_the_dark_and_long_answers_are_cut() -> None:
    drift, talks = some_talks()
    long = {row: replace(talk, turns=dict.fromkeys(talk.turns, ("Why?", "word " * 900))) for row, talk in talks.items()}
    data = data_of(render_drift(drift, long, title=TITLE))
    drawn = json.dumps(data["figures"])
    assert set(re.findall(r"#[0-9a-f]{6}|rgba\([^)]*\)", drawn)) <= set(charts.DARK) | {charts.CLEAR}
    assert len(data["talks"][0]["answers"][0]) <= ANSWERED + 1


@pytest.mark.browser
@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide", "narrow"])
def test_every_chart_is_drawn_and_fits(
    open_page: Callable[..., Any],
    viewport: dict[str, int],
    scheme: str,
) -> None:
    drift, talks = some_talks()
    evil = {row: replace(talk, turns=dict.fromkeys(talk.turns, (EVIL, EVIL))) for row, talk in talks.items()}
    tab = open_page(render_drift(drift, evil, title=EVIL), viewport=viewport, scheme=scheme)
    widths = [box.bounding_box()["width"] for box in tab.locator(".main-svg:first-child").all()]
    assert len(widths) == 3
    assert all(200 < width <= viewport["width"] for width in widths)
    assert tab.locator("#ways .points path").count() == 9 * 6
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.evaluate("$('ways').layout.font.color") == {"light": "#1d2327", "dark": "#e7eaec"}[scheme]
    tab.select_option("#choice", "4")
    until(tab, "!$('talk').hidden")
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.evaluate("window.hacked") is None


@pytest.mark.browser
def test_layer_domain_and_conversation_move_everything(open_page: Callable[..., Any]) -> None:
    drift, talks = some_talks()
    tab = open_page(render_drift(drift, talks, title=TITLE))
    for layer, key in ((2, "Shift"), (3, "ArrowRight"), (0, "Home")):
        tab.press("#layer", key)
        until(tab, f"$('ways').data[2].y[1] === D.values[0][{layer}][0][1]")
        assert tab.inner_text("#layer-name") == str(layer) + (" (target)" if layer == 2 else "")
    order = np.argsort(-np.abs(drift["drift"].sel(layer=0).values))
    listed = tab.locator("#talks tr th button").all_text_contents()
    assert listed == drift["scenario"].values[order].tolist()
    tab.select_option("#measure", "2")
    until(tab, "$('ways').layout.yaxis.title.text === 'PC2 score'")
    tab.select_option("#domain", "therapy")
    until(tab, "$('talks').children.length === 3")
    assert tab.evaluate("$('ways').data.filter(t => t.meta.part === 'talk' && t.visible !== false).length") == 3
    tab.focus("#talks tr:nth-child(2) button")
    tab.keyboard.press("Enter")
    until(tab, "!$('talk').hidden")
    name = tab.inner_text("#talk-name")
    assert name.startswith("therapy.number_")
    assert tab.evaluate("document.activeElement.textContent") == name, "the keyboard stays where it was"
    assert tab.locator("#talk-turns li").count() == 6
    assert "And then, 3? What would you do?" in tab.inner_text("#talk-turns")
    assert "below the default range" in tab.inner_text("#talk-turns li:last-child")
    tab.keyboard.press("Escape")
    until(tab, "$('talk').hidden")


@pytest.mark.browser
def test_a_turn_says_what_was_said_and_a_click_opens_it(open_page: Callable[..., Any]) -> None:
    tab = open_page(render())
    tab.evaluate("scrollTo(0, $('ways').getBoundingClientRect().top - 150)")
    box = tab.locator("#ways .points path").nth(9).bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#ways .hoverlayer .hovertext")
    shown = tab.text_content("#ways .hoverlayer")
    assert "turn 4" in shown
    assert "mean of 13 tokens" in shown
    assert "And then, 3? What would you do?" in shown
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    until(tab, "!$('talk').hidden")
    assert tab.evaluate("$('choice').value") == "1"
    tab.hover("#drift-layers .nsewdrag", position={"x": 12, "y": 60}, force=True)
    tab.wait_for_selector("#drift-layers .hoverlayer .legend")
    tab.click("#drift-layers .nsewdrag", position={"x": 12, "y": 60}, force=True)
    until(tab, "$('layer').value === '0'")
