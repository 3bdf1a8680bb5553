"""benchmarks/families.py makes its page from what the tests measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "families.py"


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    page, report = tmp_path / "models.md", tmp_path / "figures.json"
    command: list[str | Path] = [sys.executable, SCRIPT, "--quick", "--write", page, "--json", report]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert page.read_text() == done.stdout
    families = json.loads(report.read_text())["families"]
    assert list(families) == ["llama", "gemma2", "gpt_oss"]
    assert all(0 < family["padded_error"] <= 1e-5 for family in families.values())
    assert all(0.9999 <= family["bfloat16_cosine"] < 1 for family in families.values())
    assert ["packed_error" in family for family in families.values()] == [True, True, False]
    assert f"| `gpt_oss` | GptOssModel | eager | {families['gpt_oss']['padded_error']:.1e} | - |" in done.stdout
