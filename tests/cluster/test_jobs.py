"""`ray job submit` on a real cluster of several nodes: what the job says, how it ends, and how it goes on."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from personaspace.store.catalog import summarize
from personaspace.store.local import LocalFolder
from personaspace.store.verify import verify
from tests.cluster.local_cluster import LocalCluster, local_cluster
from tests.models import tiny_checkpoint

pytestmark = pytest.mark.slow

CONFIG = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [pirate, ghost, teacher, consultant], prompts: 2, max_questions: 8}}
generate: {{max_new_tokens: {tokens}, batch_rows: 16}}
extract: {{window_rows: 16}}
store: {{root: {root}, run: {run}, unit_rows: 8, layer_group: 2}}
analysis: {{components: 4}}
cluster: {{stages: 2, replicas: 2}}
"""
PROGRESS_BAR = re.compile(r"\x1b\[|[━╸]|\r(?!\n)")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head and two more nodes, one CPU each."""
    # A driver on a busy machine may need more than Ray's 3 s to end in order.
    with local_cluster(nodes=3, cpus=1, environment={"RAY_JOB_STOP_WAIT_TIME_S": "30"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def config_file(folder: Path, model: Path, run: str, tokens: int = 8) -> str:
    file = folder / f"{run}.yaml"
    file.write_text(CONFIG.format(model=model, root=folder / "runs", run=run, tokens=tokens))
    return str(file)


def test_a_job_runs_to_its_end_and_says_so(cluster: LocalCluster, model: Path, tmp_path: Path) -> None:
    done = cluster.submit("personaspace", "run", config_file(tmp_path, model, "whole"))
    url = str(tmp_path / "runs" / "whole")
    assert done.returncode == 0, done.stdout + done.stderr
    said = job_lines(done.stdout)
    assert said[0].startswith(f"run {url}  (identity ")
    assert said[-1] == f"done: run {url} is complete, report at {url}/report.html"
    assert re.search(r"^extract: replica \d is ready: 2 worker\(s\) on \d node\(s\)", done.stdout, re.M)
    assert "fit: 3 Dask worker(s) on 3 node(s), 3 thread(s)" in said
    assert not PROGRESS_BAR.search("\n".join(said))
    assert summarize(LocalFolder(Path(url))).state == "complete"
    assert verify(LocalFolder(Path(url))).problems == ()


def test_paths_that_only_the_driver_has_are_refused(cluster: LocalCluster, model: Path, tmp_path: Path) -> None:
    refused = cluster.submit("personaspace", "run", config_file(tmp_path, model, "relative"), "--store.root", "runs")
    assert refused.returncode == 1  # Ray's own: its status message has the command's.
    assert "Job entrypoint command failed with exit code 2" in refused.stdout + refused.stderr
    assert re.search(r"^error: store\.root: runs is relative, and this runs on the Ray cluster", refused.stdout, re.M)


@pytest.mark.nightly
def test_a_job_that_is_stopped_goes_on_where_it_was(cluster: LocalCluster, model: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "runs" / "stopped")
    command = ("personaspace", "run", config_file(tmp_path, model, "stopped", tokens=80))
    submitted = cluster.submit(*command, options=["--no-wait", "--submission-id", "stopped"])
    assert submitted.returncode == 0, submitted.stdout
    wait_for_commit(cluster, "stopped", folder)
    stopped = cluster.job("stop", "stopped")
    assert "was stopped" in stopped.stdout + stopped.stderr
    logs = job_lines(cluster.job("logs", "stopped").stdout)
    assert logs[-1] == "error: Interrupted. What is committed is safe; the same command resumes."
    before = summarize(folder)
    assert before.state == "partial"
    assert before.holder is not None
    assert before.holder.released
    assert not workers_left(cluster)

    assert 0 < before.generated <= before.manifest.layout.rows
    resumed = cluster.submit(*command)
    assert resumed.returncode == 0, resumed.stdout
    if before.generated < before.manifest.layout.rows:
        assert f"{before.generated} of them done before" in resumed.stdout
    assert summarize(folder).state == "complete"
    assert verify(folder).problems == ()


@pytest.mark.nightly
def test_a_driver_that_is_killed_leaves_a_run_that_goes_on(cluster: LocalCluster, model: Path, tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "runs" / "killed")
    command = ("personaspace", "generate", config_file(tmp_path, model, "killed", tokens=80))
    cluster.submit(*command, options=["--no-wait", "--submission-id", "killed"])
    wait_for_commit(cluster, "killed", folder)
    holder = summarize(folder).holder
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)
    resumed = cluster.submit(*command)
    assert resumed.returncode == 0, resumed.stdout
    assert job_lines(resumed.stdout)[-1] == f"done: generate of run {folder.url}"
    assert verify(folder).problems == ()


def wait_for_commit(cluster: LocalCluster, job: str, folder: LocalFolder) -> None:
    """Return once the job has committed something. Raises AssertionError with its log if it ends without."""
    while not any(entry.key.startswith("commits/") for entry in folder.list()):
        status = cluster.job("status", job)
        assert not re.search("failed|succeeded", status.stdout), cluster.job("logs", job).stdout


def job_lines(output: str) -> list[str]:
    """What the entrypoint printed, without what Ray says around it."""
    after = output.split("Running entrypoint for job ", 1)[1].splitlines()[1:]
    return [line for line in after if line.strip() and not re.match(r"\d{4}-\d\d-\d\d \d\d:|\x1b", line)]


def workers_left(cluster: LocalCluster) -> list[str]:
    """Actors of ours that still run on the cluster, after a moment's patience."""
    deadline = time.monotonic() + 15
    while True:
        left = [name for process in psutil.process_iter() if (name := actor_of(cluster, process))]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def actor_of(cluster: LocalCluster, process: psutil.Process) -> str:
    """Name of a process that is a worker of the cluster with an actor of ours; empty for all others."""
    with suppress(psutil.Error):
        name = process.name()
        # Other clusters may run on this machine. Workers live where the job's code was unpacked.
        if name.startswith(("ray::StageActor", "ray::Generator")) and process.cwd().startswith(str(cluster.folder)):
            return name
    return ""
