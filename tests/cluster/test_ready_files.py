"""The ready files for clusters: the Slurm script in action, without Slurm, and what can be checked of the others."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.config import load_config
from personaspace.store.catalog import summarize
from personaspace.store.local import LocalFolder
from tests.cluster.local_cluster import ROOT
from tests.cluster.test_jobs import config_file
from tests.models import tiny_checkpoint

FILES = ROOT / "configs" / "cluster"
SRUN = """#!/usr/bin/env bash
# Slurm's srun, on this machine: options, then the command.
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then tr , '\\n' <<<"$3"; else echo "$@" >>"$SCONTROL_LOG"; fi
"""


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_rayjob_runs_the_command_with_the_pinned_ray() -> None:
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text())
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["rayVersion"] == pins()["ray"]
    command = spec["entrypoint"].split()
    assert command[:4] == ["python", "-m", "personaspace", "run"]
    # Its flags are settings, whatever the config.
    flags = command[5:]
    config = load_config(ROOT / "configs" / "demo.yaml", flags)
    assert config.store.root.startswith("/shared/")
    assert config.model.id.startswith("/shared/")
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [pod["template"]["spec"]["containers"][0] for pod in pods]
    assert len({container["image"] for container in containers}) == 1
    assert all({"name": "shared", "mountPath": "/shared"} in container["volumeMounts"] for container in containers)
    assert "nvidia.com/gpu" not in containers[0]["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_image_is_of_a_python_that_the_package_takes() -> None:
    [version] = re.findall(r"^FROM python:(3\.\d+)-", (FILES / "Dockerfile").read_text(), re.M)
    assert f">={version}" in (ROOT / "pyproject.toml").read_text()
    ignored = (FILES / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)


def slurm_job(folder: Path, arguments: list[str], **changes: Any) -> subprocess.Popen[str]:
    """The script as Slurm would start it, for an allocation of one node that is this machine."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment: Mapping[str, str] = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SCONTROL_LOG": str(folder / "scontrol.log"),
        # Ports and folders come from the number.
        "SLURM_JOB_NODELIST": "this-machine",
        "SLURM_JOB_ID": str(100_000 + os.getpid()),
        "SLURM_CPUS_PER_TASK": "2",
        **changes,
    }
    with (folder / "job.log").open("w") as log:
        return subprocess.Popen(
            ["bash", str(FILES / "slurm.sh"), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.mark.nightly
def test_the_slurm_script_runs_ends_in_order_and_resumes(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    config = config_file(tmp_path, model, "slurm", tokens=80)
    folder, log = LocalFolder(tmp_path / "runs" / "slurm"), tmp_path / "job.log"
    job = slurm_job(tmp_path, [config])
    try:
        while not any(entry.key.startswith("commits/") for entry in folder.list()):
            assert job.poll() is None, log.read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)  # As `--signal=B:TERM@180` has it: to the batch script only.
        assert job.wait(90) == 130, log.read_text()
        lines = log.read_text().splitlines()
        assert "1 of 1 nodes are there" in lines
        assert "error: Interrupted. What is committed is safe; the same command resumes." in lines
        assert (tmp_path / "scontrol.log").read_text() == f"requeue {100_000 + os.getpid()}\n"
        assert summarize(folder).state == "partial"

        job = slurm_job(tmp_path, [config])
        assert job.wait(240) == 0, log.read_text()
        assert f"done: run {folder.url} is complete" in log.read_text()
        assert summarize(folder).state == "complete"
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        shutil.rmtree(f"/tmp/ray-{100_000 + os.getpid()}", ignore_errors=True)


def test_the_slurm_script_says_how_to_use_it(tmp_path: Path) -> None:
    job = slurm_job(tmp_path, [])
    assert job.wait(10) == 2
    assert (tmp_path / "job.log").read_text() == "usage: sbatch slurm.sh CONFIG [FLAGS]\n"
