"""benchmarks/scale.py makes the tables of docs/scale.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command: list[str | Path] = [sys.executable, SCRIPT, "--quick", "--json", report]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {(row["gpus"], row["name"]): row for row in json.loads(report.read_text())["scenarios"]}
    assert len(found) == 18
    assert all(0 < row["efficiency"] < 1 for row in found.values())
    for gpus in (8, 64):
        near, slow, remote = (
            found[(gpus, name)]["seconds"]
            for name in ("+ checkpoint on the nodes", "+ 10% slow, one at a third", "+ run in an object store")
        )
        assert near < slow
        assert near < remote
    assert "### 64 GPUs" in done.stdout
