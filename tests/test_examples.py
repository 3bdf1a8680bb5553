"""The examples run, as a user runs them."""

import subprocess
import sys
from pathlib import Path

from tests.models import tiny_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_read_activations(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    command = [sys.executable, EXAMPLES / "read_activations.py", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resid_post_last_prompt  (rollout, layer, hidden)" in done.stdout
    assert "so their last tokens are, too: True" in done.stdout
    assert "steered, the assistant's answer lies nearer to the ghost's" in done.stdout
