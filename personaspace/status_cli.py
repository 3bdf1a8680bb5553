"""`personaspace status` and `personaspace timeline`: watching a run from any machine that can read its store."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from personaspace.config import load_config
from personaspace.store.catalog import describe, summarize
from personaspace.store.errors import InputError
from personaspace.store.location import open_folder, run_folder
from personaspace.store.objects import Folder
from personaspace.store.sessions import SESSIONS, session_epochs, trace_key
from personaspace.store.status import describe_progress, read_sessions

CONFIG_ENDINGS = (".yaml", ".yml")
EVERY = 5.0
"""Seconds between two looks of `status --watch`."""


def add_watching(commands: Any) -> None:
    """Add `status` and `timeline` to the command line's parser."""
    status = commands.add_parser("status", help="how far a run is, how fast, what it lost, and who writes it")
    status.add_argument("target", metavar="RUN", help="folder or URL of a run, such as runs/demo, or its config file")
    status.add_argument("--watch", action="store_true", help=f"look every {EVERY:.0f} s until the run is complete")
    timeline = commands.add_parser("timeline", help="when each stage computed and wrote")
    timeline.add_argument("target", metavar="RUN", help="folder or URL of a run, or its config file")
    timeline.add_argument("--session", type=int, metavar="N", help="which session; default: the last one")
    timeline.add_argument("--save", type=Path, metavar="FILE", help="write the trace, to be opened in Perfetto")
    timeline.add_argument("--html", type=Path, metavar="FILE", help="write it as a page for the browser")


def status(target: str, *, watch: bool) -> int:
    """Print the state of a run; with ``watch`` again and again, until it is complete."""
    folder = run_of(target)
    if not watch:
        print(_state(folder)[1])
        return 0
    console = Console(highlight=False, soft_wrap=True)
    shown = ""
    while True:
        complete, text = _state(folder)
        if console.is_terminal:
            console.clear()
        if text != shown:
            console.print(text if console.is_terminal else f"{text}\n", markup=False)
        shown = text
        if complete:
            return 0
        time.sleep(EVERY)


def _state(folder: Folder) -> tuple[bool, str]:
    """Whether the run is complete, and all that is known of it."""
    summary = summarize(folder)
    progress = describe_progress(summary, read_sessions(folder))
    return summary.state in ("complete", "frozen"), "\n".join(filter(None, (describe(summary), progress)))


def timeline(target: str, *, session: int | None, save: Path | None, page: Path | None) -> int:
    """Print how busy each stage was in a session, and save its trace."""
    from personaspace.cluster.watching.timeline import describe_shares, shares

    folder = run_of(target)
    found = session_epochs((entry.key for entry in folder.list(SESSIONS)), traces=True)
    if not found or session not in (None, *found):
        known = f"it has {', '.join(map(str, found))}" if found else "it has none"
        wanted = "" if session is None else f" of session {session}"
        raise InputError(f"{folder.url}: no timeline{wanted}; {known}. A session that ran workers leaves one.")
    key = trace_key(found[-1] if session is None else session)
    trace = folder.get(key)
    print(describe_shares(shares(trace)))
    if page is not None:
        from personaspace.cluster.watching.timeline_page import timeline_page

        page.write_text(timeline_page(trace), encoding="utf-8")
        print(f"Open {page} in a browser")
    if save is not None:
        save.write_bytes(trace)
    if save is not None or page is None:
        print(f"Open {save or f'{folder.url}/{key}'} in https://ui.perfetto.dev")
    return 0


def run_of(target: str) -> Folder:
    """The folder of a run that is given as folder, URL or config file."""
    if target.endswith(CONFIG_ENDINGS):
        store = load_config(Path(target)).store
        return run_folder(store.root, store.run)
    return open_folder(target)
