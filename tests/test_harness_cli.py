"""`personaspace harness`: both models side by side on a local task, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from personaspace.cli import main
from personaspace.store.local import LocalFolder
from tests.analysis.caps.small_fit import LAYOUT, write_fitted
from tests.models import tiny_checkpoint

HIDDEN = 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted run, a model that fits it, and a task."""
    place = tmp_path_factory.mktemp("harness")
    write_fitted(LocalFolder(place / "run"), hidden=HIDDEN)
    tiny_checkpoint(place / "model", layers=LAYOUT.layers, hidden=HIDDEN)
    (place / "tasks").mkdir()
    rows = [{"question": f"What is {word}?", "choices": ["sea", "night"], "answer": 0} for word in ("it", "that")]
    (place / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "tasks" / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    (place / "tasks" / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    return place


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "does not say where its model lies"),
        (["--model", "x", "--percentile", "0"], "steer.percentile"),
        (["--model", "x", "--output", "EXISTS"], "exists"),
    ],
)
def test_refusals(place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "EXISTS").write_text("")
    given = [str(place / argument) if argument == "EXISTS" else argument for argument in arguments]
    assert main(["harness", str(place / "run"), "--tasks", "tiny_choice", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_side_by_side(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["harness", str(place / "run"), "--model", str(place / "model"), "--device", "cpu", "--method", "ablate"]
    command += ["--include-path", str(place / "tasks"), "--output", str(tmp_path / "capability.json")]
    assert main([*command, "--tasks", "tiny_choice"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["task", "metric", "plain", "steered", "difference"] in lines
    assert any(line[:2] == ["tiny_choice", "acc"] for line in lines)
    found = json.loads((tmp_path / "capability.json").read_text())
    assert set(found) == {"plain", "steered"}
    assert main([*command, "--tasks", "tiny_chess", "--overwrite"]) == 2
    assert "tiny_chess is no task of the harness" in capsys.readouterr().err
