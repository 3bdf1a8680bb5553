"""benchmarks/stage_memory.py: a stage maps its own tensors, and opens no file of others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stage_memory.py"
CONSTANT = 4_000_000
"""Bytes of code and headers that loading maps beside the tensors."""


@pytest.mark.nightly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts as Linux does")
def test_a_quick_run(tmp_path: Path) -> None:
    options = ["--quick", "--folder", tmp_path, "--json", tmp_path / "figures.json"]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]
    stages = json.loads((tmp_path / "figures.json").read_text())["random"]
    assert [stage["layers"] for stage in stages] == [[0, 6], [0, 3], [3, 6], [0, 2], [2, 4], [4, 6]]
    whole = stages[0]["share"]
    assert sum(stage["share"] for stage in stages[1:3]) == sum(stage["share"] for stage in stages[3:]) == whole
    for stage in stages:
        assert 0.9 * stage["share"] < stage["mapped"] < stage["share"] + CONSTANT
    assert all(stage["files"] < stages[0]["files"] for stage in stages[1:])
