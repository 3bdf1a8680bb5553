"""Which micro-batch goes next, and when a window can be committed: a state machine without Ray."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from personaspace.extract.packing import MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPlan:
    """A window's micro-batches, in order; at least one."""

    window: int
    batches: tuple[MicroBatch, ...]


@dataclass(slots=True)
class _Open:
    """A window of which micro-batches are on their way."""

    waiting: deque[MicroBatch]
    in_flight: int = 0


@dataclass(slots=True)
class ReplicaSchedule:
    """Feeds one replica: keeps up to ``in_flight`` micro-batches on their way, across window borders.

    ``next_window`` gives the next window from the queue that all replicas share, or None at its end: a faster
    replica takes more.
    """

    next_window: Callable[[], WindowPlan | None]
    in_flight: int
    _open: dict[int, _Open] = field(default_factory=dict)
    _exhausted: bool = False

    def due(self) -> Iterator[tuple[int, MicroBatch]]:
        """Micro-batches to submit now, with their window; each counts as on its way once yielded."""
        while sum(state.in_flight for state in self._open.values()) < self.in_flight:
            window = self._window_with_work()
            if window is None:
                return
            state = self._open[window]
            state.in_flight += 1
            yield window, state.waiting.popleft()

    def finish(self, window: int) -> bool:
        """Note that one micro-batch of ``window`` came through. True if the window is now complete."""
        state = self._open[window]
        state.in_flight -= 1
        if state.in_flight or state.waiting:
            return False
        del self._open[window]
        return True

    def _window_with_work(self) -> int | None:
        for window, state in self._open.items():
            if state.waiting:
                return window
        if self._exhausted:
            return None
        plan = self.next_window()
        if plan is None:
            self._exhausted = True
            return None
        self._open[plan.window] = _Open(deque(plan.batches))
        return plan.window
