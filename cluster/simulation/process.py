"""The driver's process: a loop, and threads beside it."""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from personaspace.cluster.simulation.clock import Clock, Link


@dataclass(frozen=True, slots=True)
class Errand:
    """What one of the threads is to do: wait for storage, compute, and say that it is done."""

    what: str
    wait: float
    seconds: float
    done: Callable[[], None] = lambda: None


class Process:
    """Python runs one thread at a time: those that compute have even shares, and those that wait cost nothing."""

    def __init__(self, clock: Clock, threads: int) -> None:
        self._clock, self._idle = clock, threads
        self._interpreter = Link(clock, 1.0, 1.0)
        self._queued: deque[Errand] = deque()
        self.outstanding = 0
        """Errands that are not done."""
        self.now = 0.0
        """Where the loop is."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Computed, by what for."""

    def spend(self, what: str, seconds: float) -> None:
        """The loop computes."""
        if seconds:
            ended: list[float] = []
            self.seconds[what] += seconds
            self._clock.run(self.now)
            self._interpreter.send(self.now, seconds, ended.append)
            self.wait(lambda: bool(ended))

    def wait(self, done: Callable[[], bool]) -> None:
        """The loop waits."""
        while not done():
            upcoming = self._clock.next
            assert upcoming is not None, "nothing is under way that could be waited for"
            self.now = max(self.now, upcoming)
            self._clock.run(self.now)

    def send(self, errand: Errand) -> None:
        """Have a thread do it, once one is free."""
        self.outstanding += 1
        self._queued.append(errand)
        self._start(self.now)

    def _start(self, now: float) -> None:
        while self._idle and self._queued:
            self._idle -= 1
            errand = self._queued.popleft()
            self._clock.at(now + errand.wait, partial(self._compute, errand))

    def _compute(self, errand: Errand, now: float) -> None:
        self._interpreter.send(now, errand.seconds, partial(self._finish, errand))

    def _finish(self, errand: Errand, now: float) -> None:
        self.seconds[errand.what] += errand.seconds
        self._idle += 1
        self.outstanding -= 1
        errand.done()
        self._start(now)
