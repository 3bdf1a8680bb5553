"""`personaspace quality` as a user types it."""

import json
from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.store.local import LocalFolder
from tests.analysis.quality.responses import LOOP, PLAIN, REFUSAL, write


@pytest.fixture
def run(tmp_path: Path) -> str:
    responses = [f"{number}: {PLAIN}" for number in range(12)]
    responses[4], responses[5], responses[9] = LOOP, REFUSAL, ""
    write(LocalFolder(tmp_path / "run"), responses, {row: {"finish_reason": "length"} for row in range(6)})
    return str(tmp_path / "run")


def test_table_worst_first(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: 12 rollouts"
    assert "    50% (25-75%) were cut off: 6" in lines
    assert "  none: no answer, out of role, duplicate, other script" in lines
    table = [line.split() for line in lines if line.split()[0] in ("role", "default", "poet", "hacker")]
    assert [row[0] for row in table] == ["role", "poet", "hacker", "default"]
    assert table[1] == ["poet", "dramatic", "4", "50%", "15-85%", "-", "50%", "25%", "25%"]


def test_examples_and_other_groups(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", run, "--by", "prompt", "--flaw", "refused", "--examples", "3"]) == 0
    out = capsys.readouterr().out
    assert f"- poet, prompt 1, q2, row 5 (0000000000000005)\n    {REFUSAL}" in out
    assert "poet 1" in out
    assert "looping:\n" not in out


def test_json(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", run, "--json", "--by", "question", "--examples", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rollouts"] == 12
    assert found["overall"]["looping"]["count"] == 1
    assert found["overall"]["looping"]["low"] < 1 / 12 < found["overall"]["looping"]["high"]
    assert {group["name"] for group in found["groups"]} == {"q0", "q1", "q2"}
    assert found["examples"]["refused"][0]["response"] == REFUSAL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run here"),
        (["RUN", "--examples", "-1"], "quality --examples: -1; give a number of 0 or more."),
        (["RUN", "--store.run", "x"], "quality: unknown argument --store.run."),
    ],
)
def test_refusals(run: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", *(run if argument == "RUN" else argument for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
