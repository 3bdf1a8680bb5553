"""Dask on the run's own Ray cluster: workers of `distributed` inside Ray actors, and their scheduler in the driver.

`ray.util.dask` is no way, since it breaks on Zarr arrays in a graph. Ray places the workers, starts them anew, and ends
them with the driver; Dask runs the tasks, and those of a lost worker again. Only processes with the key of this session
can speak with scheduler and workers: all connections are mutual TLS.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import dask
import ray
from distributed import Client, KilledWorker, LocalCluster, Security
from distributed.client import AllExit
from distributed.scheduler import NoValidWorkerError, NoWorkerError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.dask_actor import LEAVE_SECONDS, NO_PAGES, DaskWorker
from personaspace.cluster.nodes import check_nodes
from personaspace.cluster.replicas import alive_nodes
from personaspace.cluster.room import Seat, seats
from personaspace.cluster.session import ray_address, ray_cluster
from personaspace.store.errors import InputError, WorkerError
from personaspace.store.objects import Folder


@contextmanager
def analysis_workers(config: ClusterConfig, folder: Folder, say: Callable[[str], None]) -> Iterator[None]:
    """Within, Dask computes where the config says: in this process, or on workers that all read ``folder``.

    No Ray is started for the former; ``say`` is told of the latter. Raises InputError where the cluster can't do what
    is asked for, or can't read the run.
    """
    address = ray_address(config)
    outside = address is not None and address.startswith("ray://")
    if config.analysis_workers and outside:
        raise InputError(
            f"cluster.analysis_workers: {config.analysis_workers}, and this process is no part of the cluster "
            f"{address}, so its workers can't reach it. Submit the command as a job, or set it to 0."
        )
    if config.analysis_workers == 0 or outside or (config.analysis_workers is None and address is None):
        yield
        return
    with ray_cluster(config):
        places = seats(alive_nodes(), config.analysis_workers)
        if config.analysis_workers is None and len(places) < 2:
            yield
            return
        check_nodes(folder)
        with dask_on_ray(places, timeout=config.wait_timeout):
            threads = sum(seat.threads for seat in places)
            nodes = len({seat.node for seat in places})
            say(f"fit: {len(places)} Dask worker(s) on {nodes} node(s), {threads} thread(s)")
            yield


@contextmanager
def dask_on_ray(places: Sequence[Seat], *, timeout: float) -> Iterator[Client]:
    """Dask on the Ray cluster that this process drives: one worker in each of ``places``, as the current client.

    ``timeout``: seconds that all workers have to join, and for which work waits when none is left. Raises WorkerError
    when that has passed, when a worker can't start, and when a task ends one worker after another.
    """
    security = Security.temporary()
    host = _own_address()
    settings = {**NO_PAGES, "distributed.scheduler.no-workers-timeout": f"{timeout} s"}
    with ExitStack() as stack:
        with dask.config.set(settings):
            scheduler = stack.enter_context(
                LocalCluster(
                    n_workers=0,
                    host=host,
                    protocol="tls://",
                    security=security,
                    dashboard_address=None,
                    scheduler_kwargs={"dashboard_address": f"{host}:0"},
                    silence_logs=logging.CRITICAL,
                )
            )
        scheduler.loop.asyncio_loop.set_exception_handler(_report)
        client = stack.enter_context(Client(scheduler, set_as_default=False))
        actors = [_start(seat) for seat in places]
        stack.callback(_end, actors)
        serving = [
            actor.serve.remote(scheduler.scheduler_address, seat.threads, seat.memory, security)
            for actor, seat in zip(actors, places, strict=True)
        ]
        _wait_for_all(client, serving, timeout)
        stack.callback(_leave, actors)
        try:
            with client.as_current():
                yield client
        except KilledWorker as error:
            raise WorkerError(
                f"task {error.task} ended {error.allowed_failures + 1} Dask workers, one after another; the last was "
                f"{error.last_worker.address}. Where memory was short, ask for fewer cluster.analysis_workers."
            ) from error
        except (NoWorkerError, NoValidWorkerError) as error:
            raise WorkerError(
                f"no Dask worker was left for {error.timeout:g} s (cluster.wait_timeout), with work to do. Fit again "
                "once the cluster has its nodes back, or with cluster.analysis_workers set to 0, on this machine."
            ) from error


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # What a client that is interrupted leaves behind; the interruption itself is told by whoever asked for it.
    if not isinstance(context.get("exception"), AllExit):
        loop.default_exception_handler(context)


def _start(seat: Seat) -> Any:
    # Soft: where the node has gone meanwhile, the worker may start anew on another one.
    there = NodeAffinitySchedulingStrategy(node_id=seat.node, soft=True)
    return cast(Any, DaskWorker).options(num_cpus=seat.threads, scheduling_strategy=there).remote()


def _wait_for_all(client: Client, serving: Sequence[Any], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (joined := len(client.nthreads())) < len(serving):
        ended, _ = ray.wait(list(serving), timeout=0.2)
        if ended:
            try:
                ray.get(ended)
            except ray.exceptions.RayError as error:
                raise WorkerError(f"a Dask worker could not start: {error}") from error
        if time.monotonic() > deadline:
            free = ray.available_resources().get("CPU", 0.0)
            raise WorkerError(
                f"cluster.analysis_workers: {joined} of {len(serving)} Dask workers joined within {timeout:g} s "
                f"(cluster.wait_timeout); {free:g} of the cluster's {ray.cluster_resources().get('CPU', 0.0):g} CPUs "
                "are free. Ask for fewer, wait for other work to end, or set it to 0: the threads of this machine."
            )


def _leave(actors: Sequence[Any]) -> None:
    ray.wait([actor.leave.remote() for actor in actors], num_returns=len(actors), timeout=LEAVE_SECONDS)


def _end(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _own_address() -> str:
    """Where the cluster's nodes reach this process's machine."""
    own = ray.get_runtime_context().get_node_id()
    return next(node.address for node in alive_nodes() if node.id == own)
