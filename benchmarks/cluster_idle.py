"""Ray actors that do nothing, so that all that takes time is the driver. Light: their processes import this."""

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from personaspace.cluster.events import Event, Loaded
from personaspace.cluster.replicas import loaded
from personaspace.cluster.schedule import Task


@ray.remote(num_cpus=0, concurrency_groups={"store": 1})
class Idler:
    """Has the methods of a stage, and answers at once."""

    def load(self) -> Loaded:
        return loaded(time.monotonic())

    def forward(self, order: Any, received: Any) -> None:
        return None

    @ray.method(concurrency_group="store")
    def commit(self, window: int) -> None:
        return None

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Enough(Exception):
    """As many calls are answered as were asked for."""


class NoWork:
    """A step whose micro-batches are empty (supervisor.Work); counts what is answered, and ends it."""

    def __init__(self) -> None:
        self.answered = 0
        self.enough: float = math.inf

    def submit(self, actors: Sequence[Any], task: Task) -> list[Any]:
        return [send(actors, None)]

    def finished(self, replica: int, task: Task, answers: Sequence[Any]) -> None:
        self._count()

    def commit(self, actors: Sequence[Any], window: int) -> list[Any]:
        return [actor.commit.remote(window) for actor in actors]

    def committed(self, replica: int, window: int, answers: Sequence[Any]) -> Iterable[Future[Event]]:
        self._count()
        return ()

    def _count(self) -> None:
        self.answered += 1
        if self.answered >= self.enough:
            raise Enough


def send(actors: Sequence[Any], order: Any) -> Any:
    """One micro-batch through all stages, as the extraction sends it; the last stage's answer."""
    passed = None
    for actor in actors:
        passed = actor.forward.remote(order, passed)
    return passed
