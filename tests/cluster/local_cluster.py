"""A Ray cluster of several nodes on this machine: real `ray start` processes, each with its own ports and folder.

with local_cluster(nodes=3) as cluster:
    done = cluster.submit("personaspace", "run", "configs/demo.yaml", "--store.root", "/shared/runs")
    cluster.nodes[1].kill()
    cluster.add_node()
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
"""The repository: what `--working-dir` sends."""
START_SECONDS = 90.0
OBJECT_STORE = 150_000_000
"""Bytes of shared memory of each node."""
CHANGES = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
"""Variables of the cluster's processes; a token that an earlier local cluster left in ~/.ray would be asked for."""
_GIVEN: set[int] = set()


@dataclass(slots=True, eq=False)
class LocalNode:
    """One `ray start --block`, and what it started."""

    process: subprocess.Popen[bytes]
    log: Path
    metrics_port: int
    """Of its Prometheus endpoint."""

    @property
    def raylet(self) -> psutil.Process:
        """The process that is the node."""
        return next(child for child in psutil.Process(self.process.pid).children() if child.name() == "raylet")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL the raylet, as when a machine goes away; `ray start` then ends what is left of the node."""
        self.raylet.kill()
        self.process.wait(30)


@dataclass(slots=True, eq=False)
class LocalCluster:
    """A head and further nodes."""

    folder: Path
    port: int
    dashboard_port: int
    environment: dict[str, str]
    """Of every process of the cluster, and of commands that talk to it."""
    cpus: int
    nodes: list[LocalNode] = field(default_factory=list)
    """The head first; dead ones stay in the list."""

    @property
    def address(self) -> str:
        """For `ray.init` and `--cluster.address`."""
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        """For `ray job submit --address`."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def alive(self) -> int:
        """Nodes that the cluster counts as alive, as its dashboard says."""
        with urllib.request.urlopen(f"{self.dashboard}/nodes?view=summary", timeout=10) as answer:
            summary = json.load(answer)["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in summary)

    def add_node(self) -> LocalNode:
        """Start one more node; it joins within seconds."""
        head = not self.nodes
        number = len(self.nodes)
        metrics_port = free_port()
        options = ["--head", f"--port={self.port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        options += [f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={free_port()}"]
        log = self.folder / f"node-{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                    *(options if head else [f"--address={self.address}"]),
                    f"--num-cpus={self.cpus}",
                    f"--object-store-memory={OBJECT_STORE}",
                    f"--temp-dir={self.folder / str(number)}",
                    f"--dashboard-agent-listen-port={free_port()}",
                    f"--metrics-export-port={metrics_port}",
                ],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.nodes.append(LocalNode(process=process, log=log, metrics_port=metrics_port))
        return self.nodes[-1]

    def submit(self, *entrypoint: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir REPOSITORY -- python -m ENTRYPOINT...`, to its end."""
        return self.job("submit", "--working-dir", str(ROOT), *options, "--", "python", "-m", *entrypoint)

    def job(self, action: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job ACTION ...`"""
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", action, "--address", self.dashboard, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def wait_for_head(self) -> None:
        """Return once it takes jobs. Raises AssertionError with its log."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(f"{self.dashboard}/api/version"):
            waiting = self.nodes[0].alive and time.monotonic() < deadline
            assert waiting, f"the head did not start:\n{self.nodes[0].log.read_text()}"
            time.sleep(0.2)

    def wait_for_nodes(self, count: int) -> None:
        """Return once so many nodes are alive. Raises AssertionError with the nodes' logs."""
        deadline = time.monotonic() + START_SECONDS
        while self.alive != count:
            logs = "\n".join(node.log.read_text() for node in self.nodes)
            assert time.monotonic() < deadline, f"{self.alive} of {count} nodes are alive:\n{logs}"
            time.sleep(0.3)

    def stop(self) -> None:
        """End every process of the cluster, and remove its folder."""
        family = [
            process
            for node in self.nodes
            if node.alive
            for process in [psutil.Process(node.process.pid), *psutil.Process(node.process.pid).children(True)]
        ]
        for node in reversed(self.nodes):
            if node.alive:
                node.process.send_signal(signal.SIGTERM)
        for process in psutil.wait_procs(family, timeout=20)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self.nodes:
            node.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def local_cluster(
    *, nodes: int = 3, cpus: int = 1, environment: dict[str, str] | None = None
) -> Iterator[LocalCluster]:
    """A cluster of so many nodes (the head is one of them) with so many CPUs each.

    Jobs find this process's Python; they get the code by `--working-dir` only, so PYTHONPATH is not handed on.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cluster = LocalCluster(
        # Sockets lie below it, and their paths may have 107 characters.
        folder=Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")),
        port=free_port(),
        dashboard_port=free_port(),
        environment={**kept, "PATH": path, **CHANGES, **(environment or {})},
        cpus=cpus,
    )
    try:
        cluster.add_node()
        cluster.wait_for_head()
        for _ in range(nodes - 1):
            cluster.add_node()
        cluster.wait_for_nodes(nodes)
        yield cluster
    finally:
        cluster.stop()


def free_port() -> int:
    """A port that nobody listens on just now, and that this function has not given before.

    Above Ray's own worker ports, and below those that the system gives to outgoing connections.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
