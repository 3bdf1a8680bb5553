"""benchmarks/cluster.py runs on any checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.small_jobs import talk, write_responses
from tests.models import tiny_checkpoint

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cluster.py"


@pytest.mark.nightly
def test_a_quick_run(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=8)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    talks = [talk("What?", "I see " + "the sea " * (20 + number)) for number in range(8)]
    responses = write_responses(tmp_path / "responses", {"default": talks, "ghost": talks})
    report = tmp_path / "figures.json"
    options = ["--quick", "--model", model, "--responses", responses, "--folder", tmp_path / "run", "--json", report]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert figures["pipeline_over_engine"] > 0
    assert -0.01 < figures["bubble"] < 1
    assert figures["driver_calls_per_s"] > 10
    parts = figures["parts"]
    assert parts["submit_empty"] > 0
    assert parts["wait"]["2048"] > parts["wait"]["4"] > 0
    work = figures["work"]
    assert (work["rollouts"], work["windows"]) == (960, 4)
    assert all(work[name] > 0 for name in work if "_s" in name)
    assert not (tmp_path / "run").exists()
