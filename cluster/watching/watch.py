"""Watching a session from elsewhere: what its events come to goes into the run folder, and into Ray's metrics."""

import threading
import time
from contextlib import suppress
from types import TracebackType

from personaspace.cluster.events import Event, Report
from personaspace.cluster.job import Job
from personaspace.cluster.watching.metrics import Metrics
from personaspace.cluster.watching.tally import Tally
from personaspace.cluster.watching.timeline import Timeline
from personaspace.store.errors import StorageError
from personaspace.store.lease import Fence
from personaspace.store.objects import Folder
from personaspace.store.sessions import Outcome, SessionProgress, how_it_ended, trace_key, write_session

INTERVAL = 15.0
"""Seconds between two words on the progress."""
TRACE_INTERVAL = 300.0
"""Seconds between two states of the timeline, which is larger."""
LAST_WORD = 10.0
"""Seconds that the end of a session waits for storage that hangs."""


class Watch:
    """Passes events on, and tells others of them; a context manager, inside `ray_cluster`.

    Writing is the business of a thread of its own. Storage that fails costs news, and never the run.
    """

    def __init__(self, job: Job, fence: Fence, report: Report, *, interval: float = INTERVAL) -> None:
        # Not the fence's folder: that one waits for storage that fails, and news can't wait.
        self._folder: Folder = job.folder
        self._epoch, self._report, self._interval = fence.epoch, report, interval
        self._tally, self._timeline = Tally(), Timeline()
        self._metrics = Metrics(run=job.folder.name, model=job.checkpoint.name)
        self._title = f"{job.folder.url}, session {fence.epoch}"
        self._outcome: Outcome = "running"
        self._message = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="session-progress", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outcome, self._message = how_it_ended(error)
        self._stop.set()
        self._thread.join(LAST_WORD)

    def report(self, event: Event) -> None:
        """Take in one event, after those whom it concerns first."""
        self._report(event)
        self._tally.report(event)
        self._timeline.report(event, time.time())
        self._metrics.report(event, self._tally)

    def _write_on(self) -> None:
        traced = time.monotonic()
        while True:
            ended = self._stop.is_set()
            with suppress(StorageError):  # The next word says it, too.
                write_session(
                    self._folder,
                    SessionProgress(
                        epoch=self._epoch,
                        written=time.time(),
                        outcome=self._outcome,
                        message=self._message,
                        steps=self._tally.steps(),
                    ),
                )
                if ended or time.monotonic() - traced > TRACE_INTERVAL:
                    traced = time.monotonic()
                    self._folder.replace(trace_key(self._epoch), self._timeline.trace(self._title))
            if ended:
                return
            self._stop.wait(self._interval)
