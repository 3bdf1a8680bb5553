"""benchmarks/store.py runs on any complete run, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from personaspace.store.layout import Layout
from personaspace.store.lease import acquire
from personaspace.store.local import LocalFolder
from tests.store.small_runs import complete, create

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "store.py"


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    layout = Layout(segments=(40,), layers=6, hidden=16, unit_rows=8, layer_group=2)
    with acquire(LocalFolder(tmp_path / "run"), timeout=60, say=pytest.fail) as lease:
        create(lease.fence, layout)
        complete(lease.fence, layout)
    scratch, report = tmp_path / "scratch", tmp_path / "figures.json"
    options = ["--quick", "--gigabytes", "0.001", "--run", tmp_path / "run", "--folder", scratch, "--json", report]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(scratch.iterdir()) == []
    figures = json.loads(report.read_text())
    sizes = figures["bytes_per_value"]
    assert sizes["lossless"] > sizes["16"] > sizes["12"] > sizes["10"] > 1
    assert figures["error"]["lossless"]["worst_dimension_rms_over_std"] == 0
    errors = [figures["error"][kind]["worst_dimension_rms_over_std"] for kind in ("16", "12", "10", "bf16")]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]
    for name in ("reference_layer_read_over_ours", "write_over_copy", "reader_peak_bytes", "writer_peak_bytes"):
        assert figures[name] > 0
    assert "reading one layer of all rollouts" in done.stdout
