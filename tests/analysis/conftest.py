"""Pages in a real browser."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.analysis.browsing import WIDE


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
