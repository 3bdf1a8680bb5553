"""The page of a sweep: one harmless file, with shares, intervals and every response at every dose, in a browser."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from personaspace.analysis.doses.report import MARKER, SHOWN, render_doses
from personaspace.analysis.doses.turns import turns_of
from tests.analysis.browsing import NARROW, WIDE, data_of, scripts_of, text_of, until
from tests.analysis.doses.doses import EVIL, some_doses
from tests.analysis.drift.talks import some_talks

TITLE = "Steering SmolLM2 along the Assistant Axis"


def render(**choices: Any) -> str:
    return render_doses(some_doses(**choices), title=TITLE, unit="lengths of the residual stream")


def test_page_loads_nothing_and_runs_only_its_own_scripts() -> None:
    page = render()
    markup = re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", page)
    assert not re.search(r"\ssrc=|<(link|iframe|object|embed|base)\b|@import|url\(", markup)
    assert "default-src 'none'" in markup
    assert len(re.findall(r"'sha256-[^']+'", markup)) == len(scripts_of(page)) - 1 == 2
    assert MARKER in page[:4096]
    assert page == render(), "the page is a pure function of its arguments"


def test_what_was_said_stays_text() -> None:
    page = render(text=EVIL)
    assert len(scripts_of(page)) == 3
    assert "<img" not in page.replace(scripts_of(page)[1], "")


def test_the_table_has_every_share() -> None:
    text = text_of(render())
    none, third, all_of_them = r"0% \(0 to 24\)", r"33% \(14 to 61\)", r"100% \(76 to 100\)"
    assert re.search(rf"-1 12 {none} {third} {third} {third} {none} 75% 4", text)
    assert re.search(rf" 0 12 {none} {none} {none} {none} {all_of_them} 100% 4", text)
    assert re.search(rf" 1 12 {all_of_them} {none} {none} {none} {none} 100% 4", text)
    assert "the change is made behind layer 20, on all tokens" in text


def test_a_judge_and_its_categories_are_named() -> None:
    labels = ("refused", "redirected", "harmless", "harmful", "unsaid")
    doses = [replace(dose, categories=labels, said=dose.said[:1]) for dose in some_doses()]
    doses = [replace(dose, said=(replace(dose.said[0], category="harmful"),)) for dose in doses]
    page = render_doses(doses, title=TITLE, unit="capped", judge="gpt-9.labels")
    text = text_of(page)
    assert "What is answered" in text
    assert "The judge gpt-9.labels has said which of refused, redirected, harmless, harmful a response is" in text
    assert [trace["name"] for trace in data_of(page)["figures"]["shares"]["data"]] == ["harmful"]
    assert "Turn by turn" not in text


def test_turns_are_drawn_over_the_default_range() -> None:
    plain, capped, _ = some_doses()
    doses = [replace(dose, turns=turns_of(some_talks()[0])) for dose in (plain, capped)]
    page = render_doses(doses, title=TITLE, unit="capped")
    traces = data_of(page)["figures"]["turns-chart"]["data"]
    assert [trace.get("name") for trace in traces][1:] == ["default range", "-1", "0"]
    assert "Turn by turn" in text_of(page)


def test_many_prompts_are_chosen_evenly() -> None:
    prompts = data_of(render(prompts=3 * SHOWN))["prompts"]
    assert len(prompts) == SHOWN
    assert (prompts[0]["question"], prompts[-1]["question"]) == ("Question 0?", f"Question {3 * SHOWN - 1}?")


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_in_a_browser(open_page: Callable[..., Any], viewport: dict[str, int]) -> None:
    tab = open_page(render(text=EVIL), viewport)
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    figures = json.loads(tab.locator("#data").text_content())["figures"]
    assert [trace["name"] for trace in figures["shares"]["data"]] == [
        "assistant",
        "human",
        "nonhuman",
        "mystical",
        "unsaid",
    ]
    assert tab.locator("#shares .errorbars").count() > 0
    responses = tab.locator("#responses li")
    assert responses.count() == 3
    assert "-1: human, does not hold together" in responses.first.text_content()
    tab.locator("#after").click()
    until(tab, "document.getElementById('question').textContent.startsWith('default: Question 1?')")
    assert "Answer 1 at 1." in responses.last.text_content()
    tab.locator("#prompt").select_option("11")
    assert "Answer 11 at 0." in responses.nth(1).text_content()
    tab.locator("#after").click()
    assert "Answer 0 at 0." in responses.nth(1).text_content()
    assert tab.evaluate("window.hacked") is None
