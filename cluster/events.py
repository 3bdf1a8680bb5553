"""What workers and drivers tell the user: typed events, rendered in one place (progress.py)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStarted:
    """A step begins; some of its rows may be there from an earlier session."""

    step: str
    """`generate` or `extract`."""
    rows: int
    rows_done: int
    dropped: Mapping[int, str] = field(default_factory=dict)
    """Row -> reason, of rows that an earlier session dropped in this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progressed:
    """Work went through the model. Rows may wait for their window to be committed."""

    tokens: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """Rows are recorded in the store."""

    rows: int
    dropped: Mapping[int, str]
    """Row -> reason, of those that are marked unusable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Nothing has come back for a while; time passes all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something worth a line of its own."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFinished:
    """The step is complete."""

    step: str


Event = StepStarted | Progressed | Committed | Waiting | Note | StepFinished

Report = Callable[[Event], None]
"""Where events go."""
