"""What drivers say of their sessions: how far each was, how fast, and what it lost. For people; nothing rests on it.

``sessions/<epoch>.json`` is replaced now and then by the driver that holds that epoch of the lease, so that no driver
ever overwrites another one's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from personaspace.store.errors import IntegrityError, PersonaspaceError
from personaspace.store.objects import Folder
from personaspace.store.sealed import seal, unseal

SESSIONS = "sessions"
_KEY = re.compile(rf"{SESSIONS}/(\d{{6,}})(\.trace)?\.json")

Outcome = Literal["running", "done", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProgress:
    """How far a session has come with one step."""

    step: str
    """`generate`, `extract` or `judge`."""
    rows: int
    """Rollouts of the run."""
    rows_before: int
    """Of them done before this session."""
    committed: int
    """Of them in the store, those of earlier sessions included."""
    processed: int
    """Rollouts that went through the model in this session; some wait for their window to be committed."""
    tokens: int
    """Of the rollouts that went through the model in this session."""
    seconds: float
    """Since the step began."""
    finished: bool = False
    dropped: int = 0
    """Rollouts that can't be used, those of earlier sessions included."""
    repeated: int = 0
    """Rollouts that came through and were lost with their replica."""
    replicas: int = 0
    """At work."""
    windows_waiting: int = 0
    """That no replica has taken yet."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Why replicas were lost -> how many."""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    """Rollout id -> why it was left out."""

    @property
    def tokens_per_second(self) -> float | None:
        """Since the step began, start-up included; None while nothing came through."""
        return self.tokens / self.seconds if self.tokens and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far, start-up included; None while nothing came through."""
        if self.finished:
            return 0.0
        left = self.rows - self.rows_before - self.processed
        return self.seconds * max(0, left) / self.processed if self.processed > 0 else None

    @property
    def rate_text(self) -> str:
        rate = self.tokens_per_second
        return "no tokens yet" if rate is None else f"{rate:,.0f} tokens/s"

    @property
    def left_text(self) -> str:
        left = self.seconds_left
        return "time left unknown" if left is None else f"{human_duration(left)} left"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionProgress:
    """What a driver last said of its session."""

    epoch: int
    """Of its lease."""
    written: float
    """Unix seconds, by the driver's clock."""
    outcome: Outcome
    message: str = ""
    """First line of the error that ended it."""
    steps: tuple[StepProgress, ...] = ()


def session_key(epoch: int) -> str:
    return f"{SESSIONS}/{epoch:06d}.json"


def trace_key(epoch: int) -> str:
    """Of the timeline of the session, in the Chrome trace format."""
    return f"{SESSIONS}/{epoch:06d}.trace.json"


def is_session_key(key: str) -> bool:
    return _KEY.fullmatch(key) is not None


def session_epochs(keys: Iterable[str], *, traces: bool = False) -> list[int]:
    """Epochs of the sessions, or of the traces, among the keys of a run, in order."""
    return sorted(int(match[1]) for key in keys if (match := _KEY.fullmatch(key)) and bool(match[2]) == traces)


def write_session(folder: Folder, progress: SessionProgress) -> None:
    folder.replace(session_key(progress.epoch), seal(asdict(progress)))


def read_session(folder: Folder, epoch: int) -> SessionProgress | None:
    """What the driver with this epoch said; None if that is not there, or damaged: only its news are lost."""
    key = session_key(epoch)
    try:
        stored: dict[str, Any] = unseal(folder.get(key), f"{folder.url}/{key}")
    except (FileNotFoundError, IntegrityError):
        return None
    return SessionProgress(**{**stored, "steps": tuple(StepProgress(**step) for step in stored["steps"])})


def how_it_ended(error: BaseException | None) -> tuple[Outcome, str]:
    """Outcome of a session that ended with this error, and the first line of its message."""
    if error is None:
        return "done", ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "failed", first if isinstance(error, PersonaspaceError) else f"{type(error).__name__}: {first}"


def human_duration(seconds: float) -> str:
    """Such as `2 h 05 min`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
