"""Runs of finished rollouts, to be judged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personaspace.extract.judging.config import JudgeConfig
from personaspace.store.layout import Layout
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from personaspace.store.objects import Folder
from tests.extract.judging.chat_server import MODEL, PRICE_IN, PRICE_OUT, ChatServer
from tests.store import small_runs

KEY = "sk-this-must-never-be-seen-0123456789"


def make_run(path: Path, rows: int = 24, unit_rows: int = 4) -> LocalFolder:
    """The run of `fill_run` in a local folder."""
    folder = LocalFolder(path)
    fill_run(folder, rows, unit_rows)
    return folder


def fill_run(folder: Folder, rows: int = 24, unit_rows: int = 4) -> None:
    """A run whose first unit is `default`'s, the second the poet's, and all others the hacker's. Responses say `Answer
    ROW`."""
    layout = Layout(segments=(rows,), layers=2, hidden=3, unit_rows=unit_rows, layer_group=2)
    with acquire(folder, timeout=1, say=print) as lease:
        small_runs.create(lease.fence, layout)
        small_runs.commit_rollouts(lease.fence, layout, range(layout.units))


def settings(server: ChatServer, **changes: Any) -> JudgeConfig:
    """A judge at the server, with short pauses and no pity for failures; its time-out is long, since the machine that
    tests may be busy."""
    quick: Mapping[str, Any] = {
        "model": MODEL,
        "base_url": server.url,
        "concurrency": 8,
        "timeout": 60,
        "first_pause": 0.01,
        "attempts": 6,
        "max_tokens": 50,
        "price_in": PRICE_IN,
        "price_out": PRICE_OUT,
        "name": "judge",
    }
    return JudgeConfig(**{**quick, **changes})
