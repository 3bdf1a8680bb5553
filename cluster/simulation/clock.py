"""Simulated time, and bandwidth that transfers share."""

import heapq
from collections.abc import Callable
from itertools import count


class Clock:
    """What is to happen, in the order in which it does."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()

    def at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), action))

    @property
    def next(self) -> float | None:
        """When the next thing happens."""
        return self._events[0][0] if self._events else None

    def run(self, until: float) -> None:
        """Let everything happen up to a time."""
        while self._events and self._events[0][0] <= until:
            time, _, action = heapq.heappop(self._events)
            action(time)


class Link:
    """Bandwidth that transfers share evenly, each getting at most ``each`` bytes/s of ``total``."""

    def __init__(self, clock: Clock, total: float, each: float) -> None:
        self._clock, self._total, self._each = clock, total, each
        self._served = 0.0
        """Bytes that every transfer would have, had it been there from the start."""
        self._since = 0.0
        self._flows: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._version = 0

    def send(self, now: float, size: float, done: Callable[[float], None]) -> None:
        """Transfer so many bytes from now on."""
        self._serve(now)
        heapq.heappush(self._flows, (self._served + size, next(self._order), done))
        self._plan(now)

    def _rate(self) -> float:
        return min(self._each, self._total / len(self._flows))

    def _serve(self, now: float) -> None:
        if self._flows:
            self._served += (now - self._since) * self._rate()
        self._since = now

    def _plan(self, now: float) -> None:
        self._version += 1
        if self._flows:
            version, left = self._version, self._flows[0][0] - self._served
            self._clock.at(now + max(0.0, left) / self._rate(), lambda time: self._finish(time, version))

    def _finish(self, now: float, version: int) -> None:
        if version != self._version:
            return  # Another transfer has begun or ended since.
        self._serve(now)
        target, _, done = heapq.heappop(self._flows)
        self._served = max(self._served, target)
        self._plan(now)
        done(now)
