"""Pages as a browser takes them: their parts, window sizes, and how to wait."""

import json
import re
import time
from typing import Any

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def scripts_of(page: str) -> list[str]:
    """The data, Plotly and the page's own script, cut as a browser cuts them: at the first end tag."""
    return re.findall(r"(?s)<script[^>]*>(.*?)</script>", page)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script draws from."""
    return dict(json.loads(scripts_of(page)[0]))


def text_of(page: str) -> str:
    """The page without scripts, style and tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", page)))


def until(tab: Any, truth: str) -> None:
    """Waits for a condition by asking from outside: the page's policy forbids Playwright's own polling."""
    deadline = time.monotonic() + 20
    while not tab.evaluate(truth):
        assert time.monotonic() < deadline, truth
        tab.wait_for_timeout(50)
