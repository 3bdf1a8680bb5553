"""The examples run, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

from personaspace.config import load_config
from personaspace.extract.imported import plan_finished
from personaspace.extract.personas import plan_personas
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


def test_transcripts(tmp_path: Path) -> None:
    """With a transcript it can be planned; tests/cluster/test_transcripts.py reads such transcripts."""
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "talk.json").write_text(json.dumps({"conversation": talk * 3}))
    config = load_config(EXAMPLES / "transcripts.yaml", ["--generate.responses", str(tmp_path / "talk.json")])
    assert config.extract.reductions == ("turns",)
    assert [row.turns for row in plan_finished(config.generate, config.personas).rows] == [3]


def test_conversations() -> None:
    """What it asks for can be planned; tests/cluster/test_conversations.py holds such conversations."""
    config = load_config(EXAMPLES / "conversations.yaml")
    plan = plan_personas(config.personas, model_name="x", generation="g")
    assert len(plan.rows) == len(config.personas.only_scenarios) == 16
    assert {row.turns for row in plan.rows} == {8}


def test_adoption() -> None:
    """What it asks for can be planned; tests/cluster/test_sweep.py carries out such a sweep."""
    config = load_config(EXAMPLES / "adoption.yaml")
    plan = plan_personas(config.personas, model_name="x", generation="g")
    assert {row.turns for row in plan.rows} == {3}
    assert len(plan.rows) == 20
