"""A Dask worker inside a Ray actor. Imports little: a worker starts fast, and its memory is for its tasks."""

import dask
import ray
from distributed import Security, Worker

LEAVE_SECONDS = 10.0
"""For a worker to delete its files, before it is ended."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Variables of a worker: each of its tasks has one thread, also for linear algebra."""
NO_PAGES: dict[str, list[str]] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}
"""Dask's web pages ask nobody for a key, so there are none."""


@ray.remote(max_restarts=-1, max_task_retries=-1, runtime_env={"env_vars": ONE_THREAD})
class DaskWorker:
    """A worker of Dask's in the event loop of an actor."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._leaving = False

    async def serve(self, scheduler: str, threads: int, memory: int, security: Security) -> None:
        """Work for the scheduler, on so many threads and within so many bytes, until this actor is to leave.

        Ray calls it again where it has started the actor anew.
        """
        dask.config.set(NO_PAGES)
        session = ray.get_runtime_context().worker.node.get_session_dir_path()
        while not self._leaving:  # A connection may break while both sides live.
            self._worker = await Worker(
                scheduler,
                host=ray.util.get_node_ip_address(),
                nthreads=threads,
                memory_limit=memory,
                local_directory=session,
                security=security,
            )
            await self._worker.finished()

    @ray.method(max_task_retries=0)
    async def leave(self) -> None:
        """Stop working, without waiting for tasks that run."""
        self._leaving = True
        if self._worker is not None:
            await self._worker.close(timeout=LEAVE_SECONDS, executor_wait=False)
