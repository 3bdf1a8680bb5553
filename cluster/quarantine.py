"""Which rollouts of a micro-batch kill their worker: a state machine without Ray.

The micro-batch runs alone, again and again, with some of its rollouts blanked: dummies of the same lengths in their
places, so that all shapes stay as they are, and with them the bits of the other rollouts.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

FRUITLESS = 2
"""Searches that may end without a culprit before the blame goes to the machine."""


class _Phase(Enum):
    WHOLE = auto()
    """Everything but the culprits found so far."""
    BLANK = auto()
    """Nothing but dummies: do they die, too?"""
    HALF = auto()
    """The first half of the suspects."""


@dataclass(slots=True)
class Quarantine:
    """The trial of one micro-batch of ``rollouts``, named by their places 0, 1, ... in it.

    Run it as `blanked` says, alone; tell `passed` or `died`. It ends when a run of everything but the ``culprits``
    passes (`settled`: that run's results are good), or when dummies die as well (`hopeless`).
    """

    rollouts: int
    culprits: set[int] = field(default_factory=set)
    deaths: int = 0
    """Of workers, during the trial."""
    settled: bool = False
    hopeless: bool = False
    """No rollout is to blame."""
    _phase: _Phase = _Phase.WHOLE
    _suspects: list[int] = field(default_factory=list)
    _blank_passed: bool = False
    _fruitless: int = 0

    @property
    def blanked(self) -> frozenset[int]:
        """Places to fill with dummies in the next run."""
        match self._phase:
            case _Phase.WHOLE:
                return frozenset(self.culprits)
            case _Phase.BLANK:
                return frozenset(range(self.rollouts))
            case _Phase.HALF:
                return frozenset(range(self.rollouts)) - frozenset(self._half)

    @property
    def is_trial(self) -> bool:
        """Whether the next run's results mean nothing."""
        return self._phase is not _Phase.WHOLE

    def passed(self) -> None:
        """The run came through."""
        match self._phase:
            case _Phase.WHOLE:
                self.settled = True
            case _Phase.BLANK:
                self._blank_passed = True
                self._search([place for place in range(self.rollouts) if place not in self.culprits])
            case _Phase.HALF if len(self._suspects) > 1:
                self._suspects = self._suspects[len(self._half) :]
            case _Phase.HALF:
                # The last suspect is innocent by itself: a coincidence, or rollouts that only kill together.
                self._fruitless += 1
                self.hopeless = self._fruitless >= FRUITLESS
                self._phase = _Phase.WHOLE

    def died(self) -> None:
        """The run killed its worker."""
        self.deaths += 1
        match self._phase:
            case _Phase.WHOLE if len(self.culprits) == self.rollouts:
                self.hopeless = True
            case _Phase.WHOLE if self._blank_passed:
                self._search([place for place in range(self.rollouts) if place not in self.culprits])
            case _Phase.WHOLE:
                self._phase = _Phase.BLANK
            case _Phase.BLANK:
                self.hopeless = True
            case _Phase.HALF if len(self._half) > 1:
                self._suspects = self._half
            case _Phase.HALF:
                self.culprits |= set(self._half)
                self._phase = _Phase.WHOLE

    @property
    def _half(self) -> list[int]:
        return self._suspects[: (len(self._suspects) + 1) // 2]

    def _search(self, suspects: list[int]) -> None:
        self._suspects = suspects
        self._phase = _Phase.HALF
