"""A real browser for the pages."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.analysis.browsing import WIDE

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


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
