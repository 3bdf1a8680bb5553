"""How many calls the driver's loop sustains, and what each part of a call costs it: real Ray, idle actors."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count, cycle
from typing import Any

import ray
from cluster_idle import Enough, Idler, NoWork, send

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event, ReplicaStarted
from personaspace.cluster.replicas import Formation, alive_nodes, end_replica, placed_on, start_replica
from personaspace.cluster.room import Workers
from personaspace.cluster.schedule import Schedule
from personaspace.cluster.supervisor import Supervisor
from personaspace.extract.packing import MicroBatch

IN_FLIGHT = 4
BATCHES = 16
"""Micro-batches of a window."""
WINDOWS = 100_000
"""More than are ever needed."""
SHARE = Workers(device="cpu", cpus=0.001, gpus=0)
"""So little of a CPU that every replica has room."""
PROCESSES = 8
"""Actors that stand for those of many replicas, where a machine can't hold as many processes."""


def measure_loop(replicas: int, stages: int, calls: int, *, emulated: bool) -> dict[str, float]:
    """The real supervisor with idle replicas; counted from the moment when the last of them has started.

    ``emulated``: a few actors stand for all, so that hundreds of replicas have their micro-batches in flight.
    """
    idle: Any = Idler
    shared = cycle([idle.remote() for _ in range(PROCESSES)] if emulated else [None])
    work, started = NoWork(), count(1)
    begin: list[float] = []

    def report(event: Event) -> None:
        if isinstance(event, ReplicaStarted) and next(started) == replicas:
            work.enough = work.answered + calls
            begin.extend([time.perf_counter(), time.thread_time()])

    schedule = Schedule(range(WINDOWS), lambda _: [1] * BATCHES, in_flight=IN_FLIGHT, uncommitted=2, attempts=2)
    formation = Formation(
        actors=stages,
        workers=SHARE,
        together=False,
        make=lambda _, options: next(shared) or idle.options(**options).remote(),
        load=_load,
    )
    config = ClusterConfig(replicas=replicas, stall_timeout=3600)
    asked = time.perf_counter()
    with suppress(Enough):
        Supervisor("benchmark", schedule, formation, work, config, report, patience=0).run()
    stop, stop_cpu = time.perf_counter(), time.thread_time()
    start, start_cpu = begin
    return {
        "replicas": replicas,
        "stages": stages,
        "calls": calls,
        "calls_per_s": calls / (stop - start),
        "driver_s_per_call": (stop_cpu - start_cpu) / calls,
        "driver_busy": (stop_cpu - start_cpu) / (stop - start),
        "start_s": start - asked,
    }


def _load(actors: Sequence[Any]) -> list[Any]:
    return [actor.load.remote() for actor in actors]


def measure_parts(repeats: int, draw: random.Random) -> dict[str, Any]:
    """Seconds of the driver for the parts of a call, medians."""
    idle: Any = Idler
    actors = [idle.remote() for _ in range(2)]
    ray.get([actor.load.remote() for actor in actors])
    order = realistic_batch(draw)
    found: dict[str, Any] = {}
    references: list[Any] = []
    found["submit_order"] = _median(lambda: references.append(send(actors, order)), repeats) / len(actors)
    found["submit_empty"] = _median(lambda: references.append(send(actors, None)), repeats) / len(actors)
    ray.wait(references, num_returns=len(references))
    waiting = iter(references)
    found["get"] = _median(lambda: ray.get(next(waiting)), len(references))
    found["nodes"] = _median(alive_nodes, repeats)
    found["wait"] = {pending: _wait_seconds(pending, repeats) for pending in (4, 64, 512, 2048)}
    formation = Formation(
        actors=2,
        workers=SHARE,
        together=False,
        make=lambda place, options: actors[place],
        load=_load,
    )
    replicas: list[Any] = []
    found["start_replica"] = _median(lambda: replicas.append(start_replica(len(replicas), formation)), min(repeats, 50))
    found["placed_on"] = _median(lambda: placed_on(replicas[0]), repeats)
    for replica in replicas:
        end_replica(replica)
    return found


def realistic_batch(draw: random.Random) -> MicroBatch:
    """Twenty rollouts of 409 tokens."""
    ids = tuple(tuple(draw.choices(range(128_000), k=409)) for _ in range(20))
    return MicroBatch(rows=tuple(range(20)), token_ids=ids, segments=tuple(((100, 409),) for _ in ids))


def _wait_seconds(pending: int, repeats: int) -> float:
    """The supervisor's two looks at so many references of which one is ready."""
    idle: Any = Idler
    sleeper = idle.remote()
    ready = sleeper.load.remote()
    ray.get(ready)
    sleeper.sleep.remote(600)
    references = [*(sleeper.load.remote() for _ in range(pending - 1)), ready]

    def look() -> None:
        ray.wait(references, num_returns=1, timeout=2)
        ray.wait(references, num_returns=len(references), timeout=0)

    found = _median(look, repeats)
    ray.kill(sleeper)
    return found


def _median(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
