"""Dask workers in Ray actors: what they compute is right, whoever dies; they are closed to others; errors say why."""

import asyncio
import os
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import psutil
import pytest
import ray
import threadpoolctl
import xarray as xr
from distributed import Client, LocalCluster, Security
from distributed.comm import connect

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import compute_space
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.dask_workers import analysis_workers, dask_on_ray
from personaspace.cluster.replicas import alive_nodes
from personaspace.cluster.room import seats
from personaspace.store.errors import InputError, WorkerError
from personaspace.store.local import LocalFolder
from tests.analysis.test_fit import write

TIMEOUT = 120.0
SETTINGS = AnalysisConfig(permutations=20, components=3)


@pytest.fixture(scope="module")
def workers(own_ray: None) -> Iterator[Client]:
    """Two workers on the cluster's one node."""
    with dask_on_ray(seats(alive_nodes(), 2), timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    folder = LocalFolder(tmp_path / "run")
    write(folder)
    return folder


@dask.delayed(pure=False)
def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_the_fit_is_the_same_on_threads_on_processes_and_on_ray(folder: LocalFolder, workers: Client) -> None:
    with dask.config.set(scheduler="threads"):
        on_threads = compute_space(folder, SETTINGS)
    on_ray = compute_space(folder, SETTINGS)
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster):
        on_processes = compute_space(folder, SETTINGS)
    for space in (on_ray, on_processes):
        xr.testing.assert_identical(space.drop_attrs(), on_threads.drop_attrs())
    models = workers.run(lambda: {"torch", "transformers"} & set(sys.modules))
    assert list(models.values()) == [set(), set()], "their memory is for their tasks"


def test_tasks_run_on_the_workers_with_one_thread_each(workers: Client) -> None:
    pids = set(dask.compute(*(pid_after(0.3) for _ in range(6))))
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert all(psutil.Process(pid).name() != "python" for pid in pids)

    def pools() -> list[int]:
        assert np.linalg.svd(np.eye(2)).S.sum() == 2
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]

    for counts in workers.run(pools).values():
        assert counts
        assert set(counts) == {1}


def test_their_files_lie_in_the_session_s_folder_of_ray(workers: Client) -> None:
    session = ray.get_runtime_context().worker.node.get_session_dir_path()
    folders = workers.run(lambda dask_worker: dask_worker.local_directory).values()
    assert all(Path(folder).is_relative_to(session) for folder in folders)


def test_nobody_without_the_session_s_key_is_let_in(workers: Client) -> None:
    async def knock(address: str, **arguments: Any) -> None:
        async with asyncio.timeout(20):
            comm = await connect(address, timeout=5, **arguments)
            await comm.write({"op": "identity", "reply": True})
            await comm.read()

    stranger = Security.temporary().get_connection_args("client")
    addresses = [workers.scheduler.address, *workers.nthreads()]
    assert len(addresses) == 3
    own = {node.address for node in alive_nodes()}
    for address in addresses:
        assert address.startswith("tls://")
        assert address.removeprefix("tls://").rpartition(":")[0] in own
        asyncio.run(knock(address, **workers.security.get_connection_args("client")))
        with pytest.raises(OSError, match=r"TLS certificate does not match"):
            asyncio.run(knock(address, **stranger))
        with pytest.raises(OSError, match=r"."):
            asyncio.run(knock(address.replace("tls://", "tcp://")))
        # Nor somebody who doesn't care who answers.
        host, _, port = address.removeprefix("tls://").rpartition(":")
        careless = ssl.create_default_context()
        careless.check_hostname, careless.verify_mode = False, ssl.CERT_NONE
        wire = socket.create_connection((host, int(port)), timeout=10)
        with careless.wrap_socket(wire) as tls, pytest.raises(ssl.SSLError, match="certificate required"):
            tls.recv(1)


def test_web_pages_are_not_served(workers: Client) -> None:
    ports = workers.run(lambda dask_worker: dask_worker.http_server.port)
    host = workers.scheduler.address.removeprefix("tls://").rpartition(":")[0]
    for port in [workers.run_on_scheduler(lambda dask_scheduler: dask_scheduler.http_server.port), *ports.values()]:
        for page in ("/", "/status", "/metrics", "/info/main/workers.html", "/json/identity.json"):
            with socket.create_connection((host, port), timeout=10) as wire:
                wire.sendall(f"GET {page} HTTP/1.0\r\n\r\n".encode())
                assert wire.recv(100).startswith(b"HTTP/1.1 404 "), page


def test_a_worker_that_is_killed_comes_back_and_the_result_is_right(workers: Client) -> None:
    x = np.random.default_rng(0).normal(size=(4000, 20))
    chunks = da.from_array(x, chunks=(100, 20)).map_blocks(lambda block: (time.sleep(0.2), block)[1])
    before = set(workers.run(os.getpid).values())
    computing = workers.compute(chunks.T @ chunks)
    time.sleep(1.5)
    os.kill(min(before), signal.SIGKILL)
    np.testing.assert_allclose(computing.result(), x.T @ x)
    deadline = time.monotonic() + TIMEOUT
    while len(workers.nthreads()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    after = set(workers.run(os.getpid).values())
    assert len(after) == 2
    assert len(after & before) == 1


def test_a_worker_whose_connection_broke_joins_again(workers: Client) -> None:
    before = workers.run(os.getpid)
    # It goes before it has answered.
    workers.run(lambda dask_worker: dask_worker.batched_stream.abort(), workers=[min(before)], on_error="ignore")
    deadline = time.monotonic() + TIMEOUT
    while min(before) in workers.nthreads() or len(workers.nthreads()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert set(workers.run(os.getpid).values()) == set(before.values())


@pytest.mark.usefixtures("workers")
def test_a_cluster_without_free_cpus_is_named() -> None:
    message = (
        r"cluster\.analysis_workers: 0 of 1 Dask workers joined within 1 s \(cluster\.wait_timeout\); 0 of the "
        r"cluster's 2 CPUs are free\. Ask for fewer, wait for other work to end, or set it to 0: the threads of this "
        r"machine\."
    )
    with pytest.raises(WorkerError, match=f"^{message}$"), dask_on_ray(seats(alive_nodes(), 1), timeout=1):
        pass


def test_workers_that_could_not_reach_the_driver_are_refused(folder: LocalFolder) -> None:
    config = ClusterConfig(address="ray://10.0.0.1:10001", analysis_workers=2)
    message = (
        "cluster.analysis_workers: 2, and this process is no part of the cluster ray://10.0.0.1:10001, so its workers "
        "can't reach it. Submit the command as a job, or set it to 0."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"), analysis_workers(config, folder, print):
        pass
