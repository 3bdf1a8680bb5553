"""When the next request may be sent: so many a minute, and none while the endpoint asks for patience."""

import asyncio
import random

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, before they are spread."""


class Pace:
    """Shared by all requests of a session."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next = 0.0
        self._held_until = 0.0

    async def turn(self) -> None:
        """Wait until a request may be sent."""
        loop = asyncio.get_running_loop()
        turn = -1.0
        while turn < self._held_until or turn < 0:
            # Whoever was held back on the way takes a new turn, so that all don't go at once afterwards.
            turn = max(loop.time(), self._next, self._held_until)
            self._next = turn + self._interval
            await asyncio.sleep(turn - loop.time())

    def hold(self, seconds: float) -> None:
        """Let nobody send anything for so long."""
        self._held_until = max(self._held_until, asyncio.get_running_loop().time() + seconds)


def pause(attempt: int, first: float, wait: float | None) -> float:
    """Seconds after the failed attempt ``attempt`` (0, 1, ...): what was asked for, or more from one to the next.

    Spread, so that requests that failed together don't come back together.
    """
    if wait is not None:
        return wait + random.uniform(0, first)
    return min(first * 2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.5)
