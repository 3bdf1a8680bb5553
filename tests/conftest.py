"""For all tests: no real Hugging Face hub, cores that are shared, Ray clusters that ask for no token, no deadlines; and
a real browser."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# Before huggingface_hub is imported, which reads it once. What needs the hub fails at once, without its retries.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. With a pool of threads as wide as the machine in each process, each waits for the others'.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else the first local cluster turns Ray's tokens on in this process, which no cluster that it joins later asks for.
os.environ["RAY_AUTH_MODE"] = "disabled"
# How long a busy machine takes says nothing of the code.
settings.register_profile("personaspace", deadline=None)
settings.load_profile("personaspace")

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
        stop("NO BROWSER: nobody looked at the pages. Run `apt-get install chromium`.")
    from playwright.sync_api import sync_playwright  # Not in vLLM's environment, whose tests need no browser.

    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=path, args=CHROMIUM)
