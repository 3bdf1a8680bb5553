"""How far a judging session is."""

from dataclasses import dataclass, field

from personaspace.store.judging import Spending
from personaspace.store.sessions import StepProgress


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgingProgress:
    """How far a session is."""

    rows: int
    """Rollouts to judge in this session."""
    done_before: int = 0
    """Others that are wanted, by earlier sessions."""
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

    def as_step(self, *, finished: bool = False) -> StepProgress:
        """The same, as `personaspace status` shows it."""
        return StepProgress(
            step="judge",
            rows=self.rows + self.done_before,
            rows_before=self.done_before,
            committed=self.done + self.done_before,
            processed=self.done,
            tokens=self.spending.prompt_tokens + self.spending.completion_tokens,
            seconds=self.seconds,
            finished=finished,
            dropped=self.unjudged,
        )

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None while nothing came back."""
        return self.seconds * (self.rows - self.done) / self.done if self.done else None
