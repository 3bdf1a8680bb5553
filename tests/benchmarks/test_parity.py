"""The reference project's formulas, and our import and fit of the same files, give the same axis and components."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parity.py"


def test_axis_and_variance_are_those_of_the_reference_s_formulas(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "--json", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(report.read_text())
    assert figures["min_axis_cosine_float32"] > 1 - 1e-9
    assert figures["max_variance_ratio_difference_float32"] < 1e-6
    assert 1e-5 < figures["max_variance_ratio_difference_bfloat16"] < 1e-2, "its own rounding tells"
