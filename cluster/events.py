"""What workers and drivers tell the user: typed events, rendered in one place (progress.py)."""

import re
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
class Busy:
    """What a worker did, and when."""

    activity: str
    """`forward`, `commit`, `generate`."""
    start: float
    """Unix seconds, by the clock of the worker's node."""
    stop: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Worked:
    """Something that a replica was asked for is done."""

    step: str
    replica: int
    batch: str
    """What it worked on, such as `window 12, micro-batch 3`."""
    busy: tuple[Busy, ...]
    """Of each of its workers, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A worker is ready."""

    node: str
    """Ray's id of its node."""
    pid: int
    seconds: float
    """That loading took."""
    resident: int
    """Bytes of memory that its process holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaStarted:
    """A replica has loaded its model."""

    step: str
    replica: int
    """Its number; one that is started anew gets another."""
    workers: tuple[Loaded, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaLost:
    """A replica was lost, and what was not committed runs again on another one."""

    step: str
    replica: int
    reason: str
    windows: int
    """That run again."""
    rollouts: int
    """That had come through, and run again."""

    @property
    def kind(self) -> str:
        """The reason without what is of this one case: pids, addresses, messages."""
        return re.split(r" \(|: ", self.reason, maxsplit=1)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantined:
    """Rollouts were found to kill their worker, and are left out."""

    step: str
    rollouts: Mapping[str, str]
    """Rollout id -> reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Time passes, be there news or none."""

    windows: int = 0
    """That no replica has taken yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something worth a line of its own."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFinished:
    """The step is complete."""

    step: str


Event = (
    StepStarted
    | Progressed
    | Committed
    | ReplicaStarted
    | ReplicaLost
    | Quarantined
    | Worked
    | Waiting
    | Note
    | StepFinished
)

Report = Callable[[Event], None]
"""Where events go."""
