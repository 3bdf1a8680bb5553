"""Stopping a run of which too much is lost: better early, with a summary, than complete and useless."""

from collections import Counter

from personaspace.cluster.events import Committed, Event, Report, StepStarted
from personaspace.store.errors import PersonaspaceError


class TooManyDroppedError(PersonaspaceError):
    """More rollouts had to be dropped than the config allows."""

    exit_code = 7


class DropLimit:
    """Stands between the steps and what shows their events: counts dropped rollouts, and ends the run at a limit.

    What is committed stays; the run can be resumed with a higher limit.
    """

    def __init__(self, report: Report, *, rows: int, share: float) -> None:
        self._report, self._rows, self._share = report, rows, share
        self._dropped: dict[int, str] = {}

    def report(self, event: Event) -> None:
        """Pass the event on. Raises TooManyDroppedError, with the reasons, once the limit is exceeded."""
        self._report(event)
        if not isinstance(event, StepStarted | Committed):
            return
        self._dropped |= event.dropped
        # As a share: 0.29 * 100 is less than 29.
        if len(self._dropped) / self._rows <= self._share:
            return
        counts = Counter(self._dropped.values()).most_common()
        reasons = "\n".join(f"  {count} x {reason}" for reason, count in counts[:10])
        more = f"\n  and {len(counts) - 10} more reasons" if len(counts) > 10 else ""
        raise TooManyDroppedError(
            f"{len(self._dropped)} of {self._rows} rollouts are dropped, more than extract.max_dropped "
            f"({self._share * 100:g}%) allows:\n{reasons}{more}\nWhat is committed stays. Mend the cause, or go on "
            "with a higher --extract.max-dropped."
        )
