"""Several runs in one command: each in a process of its own, so that one that fails costs the others nothing."""

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from personaspace.config import RunConfig, load_config
from personaspace.store.errors import InputError

INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one run of a batch ended."""

    config: Path
    code: int
    """Exit code of its command."""
    seconds: float
    error: str
    """The first line of its error message; empty if there was none."""


class Batch:
    """Runs of several configs, ``jobs`` of them at a time; ``flags`` count for each."""

    def __init__(self, command: str, configs: Sequence[Path], flags: Sequence[str], *, jobs: int) -> None:
        self._command, self._configs, self._flags, self._jobs = command, configs, flags, jobs
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self) -> int:
        """Carry all of them out, then print a summary. Returns 0, or the exit code of the first that failed.

        Raises InputError before anything begins if a config can't be used, or if two have the same place.
        """
        check_distinct([(file, load_config(file, self._flags)) for file in self._configs])
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                outcomes = list(pool.map(self._run_one, self._configs))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        summarize(outcomes)
        failures = [outcome.code for outcome in outcomes if outcome.code]
        return INTERRUPTED if INTERRUPTED in failures else failures[0] if failures else 0

    def _run_one(self, config: Path) -> Outcome:
        start = time.monotonic()
        with self._lock:
            if self._stopped:
                return Outcome(config=config, code=INTERRUPTED, seconds=0, error="not started")
            process = subprocess.Popen(
                [sys.executable, "-m", "personaspace", self._command, str(config), *self._flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                bufsize=1,
                # A terminal's Ctrl-C comes to this process, which hands it on: once.
                start_new_session=True,
            )
            self._running.add(process)
        assert process.stdout is not None
        name = f"[{config.stem}] " if self._jobs > 1 else ""
        error = ""
        if not name:
            print(f"== {config}", flush=True)
        for line in process.stdout:
            print(f"{name}{line}", end="", flush=True)
            if line.startswith("error: "):
                error = line.removeprefix("error: ").strip()
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code < 0:
            error = f"ended by {signal.Signals(-code).name}"
        return Outcome(config=config, code=code, seconds=time.monotonic() - start, error=error)

    def _stop(self, *_: object) -> None:
        """End in order: nothing new begins, and what runs is asked to stop."""
        self._stopped = True
        for process in list(self._running):
            process.terminate()


def check_distinct(configs: Sequence[tuple[Path, RunConfig]]) -> None:
    """Raise InputError if two configs write the same run."""
    counts = Counter((config.store.root, config.store.run) for _, config in configs)
    for (root, run), count in counts.items():
        if count > 1:
            files = [str(file) for file, config in configs if (config.store.root, config.store.run) == (root, run)]
            raise InputError(
                f"store.run: {run!r} in {root} is the place of {count} configs ({', '.join(files)}); give each "
                "its own. Nothing was started."
            )


def summarize(outcomes: Sequence[Outcome]) -> None:
    """Print how each run ended."""
    done = sum(not outcome.code for outcome in outcomes)
    print(f"== {done} of {len(outcomes)} done")
    for outcome in outcomes:
        told = {0: "done", INTERRUPTED: "interrupted"}.get(outcome.code, f"failed ({outcome.code})")
        error = f"  {outcome.error}" if outcome.error else ""
        print(f"{told:>12}  {outcome.seconds / 60:6.1f} min  {outcome.config}{error}", flush=True)
