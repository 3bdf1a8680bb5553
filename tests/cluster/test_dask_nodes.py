"""Dask on a Ray cluster of several nodes: nodes that die, tasks that kill, a driver that is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest
from ray.cluster_utils import Cluster

from personaspace.cli import main
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.dask_workers import dask_on_ray
from personaspace.cluster.replicas import alive_nodes
from personaspace.cluster.room import Seat, seats
from personaspace.cluster.session import ray_cluster
from personaspace.store.errors import WorkerError
from personaspace.store.local import LocalFolder
from personaspace.store.space import open_space
from tests.analysis.test_fit import write

pytestmark = pytest.mark.slow
TIMEOUT = 120.0
DRIVER = """
import os, time
import dask
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.dask_workers import dask_on_ray
from personaspace.cluster.replicas import alive_nodes
from personaspace.cluster.room import Seat, seats
from personaspace.cluster.session import ray_cluster
from personaspace.store.interruption import orderly_end

with orderly_end(), ray_cluster(ClusterConfig()), dask_on_ray(seats(alive_nodes(), None), timeout=120) as client:
    print(*client.run(os.getpid).values(), flush=True)
    dask.compute(*(dask.delayed(time.sleep)(seconds) for seconds in range(600, 604)))
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and two nodes with one each."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@dask.delayed(pure=False)
def square(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return number**2


@dask.delayed(pure=False)
def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_stored_run_is_fitted_on_every_node(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LocalFolder(tmp_path / "run")
    write(folder)
    fit = ["fit", folder.url, "--analysis.permutations", "20"]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    assert main([*fit, "--cluster.analysis-workers", "0"]) == 0
    assert "Dask worker" not in capsys.readouterr().out
    on_threads = open_space(folder).load()
    assert main(fit) == 0
    assert capsys.readouterr().out.startswith("fit: 2 Dask worker(s) on 2 node(s), 2 thread(s)\n")
    assert open_space(folder).load().drop_attrs().identical(on_threads.drop_attrs())


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_ends_leaves_no_workers(cluster: Cluster, number: signal.Signals) -> None:
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(workers) == 2
        time.sleep(1)
        driver.send_signal(number)
        _, errors = driver.communicate(timeout=60)
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    if number == signal.SIGTERM:
        assert errors.splitlines()[-1].endswith("Interrupted. What is committed is safe; the same command resumes.")
        assert "never retrieved" not in errors


@pytest.mark.nightly
def test_nodes_that_go_are_done_without_until_none_is_left(cluster: Cluster) -> None:
    with ray_cluster(ClusterConfig(address=cluster.address)):
        places = seats(alive_nodes(), None)
        message = (
            r"^no Dask worker was left for 20 s \(cluster\.wait_timeout\), with work to do\. Fit again once the "
            r"cluster has its nodes back, or with cluster\.analysis_workers set to 0, on this machine\.$"
        )
        with pytest.raises(WorkerError, match=message):
            lose_one_node_then_the_other(cluster, places)


def lose_one_node_then_the_other(cluster: Cluster, places: list[Seat]) -> None:
    with dask_on_ray(places, timeout=TIMEOUT) as client:
        first, second = cluster.worker_nodes
        computing = client.compute([square(number, 0.2) for number in range(60)])
        time.sleep(2)
        cluster.remove_node(first, allow_graceful=False)
        assert client.gather(computing) == [number**2 for number in range(60)]
        assert len(client.nthreads()) == 1
        cluster.remove_node(second, allow_graceful=False)
        deadline = time.monotonic() + TIMEOUT
        while client.nthreads():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "no_workers_timeout", 20.0))
        dask.compute(square(2, 0))


@pytest.mark.nightly
def test_a_task_that_kills_its_workers_is_named(cluster: Cluster) -> None:
    with ray_cluster(ClusterConfig(address=cluster.address)):
        places = seats(alive_nodes(), None)
        message = r"^task kill_me-\S+ ended 4 Dask workers, one after another; the last was tls://.*\. Where memory was"
        with pytest.raises(WorkerError, match=message), dask_on_ray(places, timeout=TIMEOUT):
            dask.compute(kill_me())
    assert square(3, 0).compute() == 9, "in this process again"
