"""The chat page in a real browser: asked, streamed, charted, capped anew, reloaded; and two people at once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from personaspace.store.formats.transcripts import read_transcripts
from personaspace.store.local import LocalFolder
from tests.analysis.browsing import NARROW, WIDE
from tests.analysis.caps.small_fit import LAYOUT, write_fitted
from tests.models import tiny_checkpoint

HIDDEN = 32
TOKEN = "nobody-guesses-this"
TURN = "#turn-{side}-{number} .text"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`personaspace chat` on a tiny model, with a token."""
    place = tmp_path_factory.mktemp("chat")
    write_fitted(LocalFolder(place / "run"), hidden=HIDDEN)
    tiny_checkpoint(place / "tiny", layers=LAYOUT.layers, hidden=HIDDEN)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "personaspace", "chat", str(place / "run"), "--model", str(place / "tiny")]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu", "--max-tokens", "16"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PERSONASPACE_TOKEN": TOKEN},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"open http://127.0.0.1:{port}/?token=...\n"
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Callable[..., Any]]:
    """A person with a browser of their own; fails on errors in its console."""
    problems: list[str] = []
    contexts = []

    def visit(viewport: dict[str, int] = WIDE) -> Any:
        context = browser.new_context(viewport=viewport, accept_downloads=True)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on(
            "request",
            lambda request: None if request.url.startswith((url, "data:", "blob:")) else problems.append(request.url),
        )
        tab.goto(f"{url}?token={TOKEN}")
        tab.get_by_placeholder("Say something to both").wait_for()
        return tab

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def say(tab: Any, text: str, number: int) -> list[str]:
    """Say it, and wait for both answers."""
    tab.get_by_placeholder("Say something to both").fill(text)
    tab.get_by_role("button", name="Send").click()
    return answers(tab, number)


def answers(tab: Any, number: int) -> list[str]:
    found = []
    for side in ("plain", "capped"):
        turn = tab.locator(TURN.format(side=side, number=number))
        turn.wait_for()
        found.append(str(turn.text_content()))
    return found


def points(tab: Any) -> list[int]:
    """Turns in the chart, of each side."""
    return list(tab.evaluate("document.querySelector('.js-plotly-plot').data.filter(t => t.meta).map(t => t.x.length)"))


def test_without_the_token_there_is_nothing(browser: Any, url: str) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(url)
    tab.get_by_text("This page asks for a token").wait_for()
    assert tab.get_by_placeholder("Say something to both").count() == 0
    context.close()


def test_a_conversation(visit: Callable[..., Any], tmp_path: Path) -> None:
    tab = visit()
    first = say(tab, "Who are you?", 0)
    tab.wait_for_function(
        "document.querySelector('.js-plotly-plot')?.data?.filter(t => t.meta).every(t => t.x.length === 1)"
    )
    second = say(tab, "Why?", 1)
    assert len(set(first + second)) > 2
    tab.wait_for_function(
        "document.querySelector('.js-plotly-plot').data.filter(t => t.meta).every(t => t.x.length === 2)"
    )
    assert tab.locator("#turn-capped-1 .place").text_content().count("cap p25 at layer 6") == 1
    assert "cap" not in tab.locator("#turn-plain-1 .place").text_content()

    tab.reload()
    assert answers(tab, 0) + answers(tab, 1) == first + second, "a reload restores it"
    tab.wait_for_function(
        "document.querySelector('.js-plotly-plot')?.data?.filter(t => t.meta).every(t => t.x.length === 2)"
    )

    slider = tab.get_by_role("slider", name="strength of the cap").locator("[tabindex]")
    for _ in range(24):
        slider.press("ArrowLeft")
    tab.get_by_text("leaves 1% of the run's rollouts alone").wait_for()
    tab.get_by_role("button", name="Answer again with this cap").click()
    tab.get_by_text("cap p1 at layer 6").wait_for()
    again = answers(tab, 1)
    assert again[0] == second[0], "the slider changes the capped side only"
    assert answers(tab, 0) == first

    with tab.expect_download() as saving:
        tab.get_by_role("button", name="Save").click()
    saving.value.save_as(tmp_path / "conversation.json")
    tab.get_by_role("button", name="Transcript").click()
    with tab.expect_download() as exporting:
        tab.locator(".q-menu").get_by_text("Capped").click()
    exporting.value.save_as(tmp_path / "transcript.json")
    [transcript] = read_transcripts(tmp_path / "transcript.json")
    assert [message["content"] for message in transcript.conversation] == ["Who are you?", first[1], "Why?", again[1]]

    tab.get_by_role("button", name="New").click()
    tab.locator("#turn-plain-0").wait_for(state="detached")
    with tab.expect_file_chooser() as choosing:
        tab.get_by_role("button", name="Open").click()
    choosing.value.set_files(tmp_path / "conversation.json")
    assert answers(tab, 1) == again, "what was saved is opened again"
    assert json.loads((tmp_path / "conversation.json").read_text())["said"] == ["Who are you?", "Why?"]


def test_a_point_of_the_chart_leads_to_its_turn(visit: Callable[..., Any]) -> None:
    tab = visit()
    say(tab, "Who are you?", 0)
    tab.wait_for_function("document.querySelectorAll('.js-plotly-plot .scatterlayer .points path').length >= 2")
    box = tab.locator(".js-plotly-plot .scatterlayer .points path").last.bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.locator(".answer.marked").wait_for()


def test_a_story_is_told_turn_by_turn(visit: Callable[..., Any]) -> None:
    tab = visit()
    tab.get_by_label("Story").click()
    tab.get_by_role("option", name="Somebody has moved to a city").click()
    tab.get_by_role("button", name="Say its next turn").click()
    answers(tab, 0)
    assert "I moved here for work three months ago" in tab.locator(".said").first.text_content()


def test_two_people_at_once(visit: Callable[..., Any]) -> None:
    """Each has a conversation of their own; both tabs of one browser show the same."""
    one, other = visit(), visit(NARROW)
    one.get_by_placeholder("Say something to both").fill("Who are you?")
    other.get_by_placeholder("Say something to both").fill("Tell me of the sea.")
    one.get_by_role("button", name="Send").click()
    other.get_by_role("button", name="Send").click()
    found = [answers(tab, 0) for tab in (one, other)]
    assert [tab.locator(".said").count() for tab in (one, other)] == [2, 2]
    assert found[0] != found[1]
    twin = one.context.new_page()
    twin.goto(one.url)
    assert answers(twin, 0) == found[0]


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits(visit: Callable[..., Any], viewport: dict[str, int]) -> None:
    tab = visit(viewport)
    say(tab, "Who are you? " + "x" * 90, 0)
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    plain, capped = (tab.locator(f"#turn-{side}-0").bounding_box() for side in ("plain", "capped"))
    assert (plain["y"] == capped["y"]) == (viewport == WIDE), "side by side, or one below the other"
