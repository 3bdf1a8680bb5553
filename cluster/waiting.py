"""Waiting for workers: never silent for long, and failures come out as the user's errors."""

from collections.abc import Iterable
from typing import Any

import ray

from personaspace.cluster.events import Report, Waiting
from personaspace.cluster.faults import unwrap

PATIENCE = 5.0
"""Seconds after which the driver shows a sign of life although no worker did."""


def next_finished(references: Iterable[Any], report: Report) -> Any:
    """The first of Ray's object references to be ready, whether its task succeeded or failed."""
    pending = list(references)
    while True:
        finished, _ = ray.wait(pending, num_returns=1, timeout=PATIENCE)
        if finished:
            return finished[0]
        report(Waiting())


def result(reference: Any) -> Any:
    """Value of a finished task. Raises the user's error inside what Ray raises."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        raise unwrap(error) from None
