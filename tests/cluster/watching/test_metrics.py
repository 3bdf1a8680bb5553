"""Numbers at Ray's Prometheus endpoint, from a driver as a command is one: a process that joins its cluster once.

Ray counts what a process exports once more for each cluster that it has joined before, so a test's process won't do.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Busy, Event, Progressed, ReplicaLost, StepStarted, Worked
from personaspace.cluster.session import ray_cluster
from personaspace.cluster.watching.metrics import Metrics
from personaspace.cluster.watching.tally import Tally
from tests.cluster.watching.scraping import PATIENCE, scrape

RAY_INTERVAL = 10.0
"""Seconds between two exports of a process."""
EVENTS: tuple[Event, ...] = (
    StepStarted(step="extract", rows=32, rows_done=0, dropped={}),
    Progressed(tokens=100, rows=8),
    Progressed(tokens=50, rows=8),
    ReplicaLost(step="extract", replica=0, reason="a worker process died", windows=1, rollouts=8),
    Progressed(tokens=100, rows=8),
    Worked(step="extract", replica=0, batch="x", busy=(Busy(activity="forward", start=3.0, stop=4.5),)),
)
COUNTED = {
    "ray_personaspace_tokens_total": 250.0,
    "ray_personaspace_rollouts_total": 24.0,
    "ray_personaspace_rollouts_repeated_total": 8.0,
    "ray_personaspace_replicas_lost_total": 1.0,
    "ray_personaspace_busy_seconds_total": 1.5,
}


def exported(address: str) -> dict[str, float]:
    """What the endpoint says of the events, an export after it has said something of all."""
    with ray_cluster(ClusterConfig(address=address)):
        metrics, tally = Metrics(run="counted", model="model"), Tally()
        for event in EVENTS:
            tally.report(event)
            metrics.report(event, tally)
        deadline = time.monotonic() + PATIENCE
        while set(_counters()) != set(COUNTED) and time.monotonic() < deadline:
            time.sleep(1)
        time.sleep(RAY_INTERVAL)
        return _counters()


def _counters() -> dict[str, float]:
    values = {line.partition("{")[0]: float(line.split()[-1]) for line in scrape() if 'run="counted"' in line}
    return {name: value for name, value in values.items() if name in COUNTED}


@pytest.mark.slow
def test_each_event_is_counted_once(ray_head: str) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        assert processes.submit(exported, ray_head).result() == COUNTED
