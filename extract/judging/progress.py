"""How far a judging session is."""

from dataclasses import dataclass, field

from personaspace.store.judging import Spending


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgingProgress:
    """How far a session is."""

    rows: int
    """Rollouts to judge in this session."""
    scored: int = 0
    unjudged: int = 0
    """That the judge could give no score."""
    requests: int = 0
    """Sent."""
    failed: int = 0
    """Requests that the endpoint failed."""
    unread: int = 0
    """Answers that held no score."""
    spending: Spending = field(default_factory=Spending)
    spent_before: float = 0.0
    """USD, by earlier sessions at most."""
    seconds: float = 0.0
    is_over_budget: bool = False
    """The rest did not fit into the budget."""

    @property
    def done(self) -> int:
        return self.scored + self.unjudged

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None while nothing came back."""
        return self.seconds * (self.rows - self.done) / self.done if self.done else None
