"""`personaspace drift`: what it prints and writes, and what it refuses to replace."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from personaspace.analysis.drift.report import MARKER
from personaspace.cli import main
from tests.analysis.drift.talk_runs import MEAN, write_fitted_run, write_talk_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a run of roles and one of conversations."""
    write_fitted_run(tmp_path / "roles", talks=False, arrays=(MEAN,))
    write_talk_run(tmp_path / "talks", roles=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_tables_and_words(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", "talks", "--space", "roles", "--tables", "tables"]) == 0
    out = capsys.readouterr().out
    assert "/talks: 3 conversations, 10 turns, in the space of " in out
    assert "layer 1: default range " in out
    assert "(5% to 95% of 4 default rollouts)" in out
    lines = [line.split() for line in out.splitlines()]
    assert next(line for line in lines if line[:1] == ["therapy"])[1] == "1"
    largest = lines[lines.index(["largest", "drift:"]) + 2]
    assert (largest[0], largest[1], largest[-2:]) == ("therapy.city", "4", ["turn", "2"])
    assert out.endswith("tables: tables\npage: drift.html\n")
    page = (runs / "drift.html").read_text()
    assert MARKER in page
    assert "written by somebody/else-70B, tiny and read by tiny" in page
    names = sorted(file.name for file in (runs / "tables").iterdir())
    assert names == ["conversations.csv", "conversations.parquet", "turns.csv", "turns.parquet"]
    turns = pyarrow.parquet.read_table(runs / "tables" / "turns.parquet")
    assert turns.num_rows == len((runs / "tables" / "turns.csv").read_text().splitlines()) - 1 == 20
    assert main(["drift", "talks", "--space", "roles", "--tables", "tables", "--layer", "0"]) == 0, "both are ours"
    assert pyarrow.parquet.read_table(runs / "tables" / "turns.parquet").num_rows == 10


def test_json_is_everything_and_nothing_else(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", "talks", "--space", "roles", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not (runs / "drift.html").exists()
    assert (found["target_layer"], found["default_rollouts"], found["quantiles"]) == (1, 4, [0.05, 0.95])
    assert [one["name"] for one in found["layers"][1]["groups"]] == ["all", "coding", "therapy"]
    assert found["layers"][1]["groups"][2]["drift_interval"] == [None, None]
    assert (len(found["conversations"]), len(found["turns"])) == (6, 20)
    assert main(["drift", "talks", "--space", "roles", "--json", "--output", "deep/page.html"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (runs / "deep" / "page.html").exists()


def test_files_of_others_are_not_replaced(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "drift.html").write_text("my own page")
    assert main(["drift", "talks", "--space", "roles"]) == 2
    assert "drift.html: exists already; choose another name, or allow it to be overwritten." in capsys.readouterr().err
    assert (runs / "drift.html").read_text() == "my own page"
    (runs / "tables").mkdir()
    (runs / "tables" / "notes.txt").write_text("mine")
    assert main(["drift", "talks", "--space", "roles", "--output", "b.html", "--tables", "tables"]) == 2
    assert "tables: exists and is not empty" in capsys.readouterr().err
    assert main(["drift", "talks", "--space", "roles", "--overwrite", "--tables", "tables"]) == 0
    assert MARKER in (runs / "drift.html").read_text()
    assert (runs / "tables" / "notes.txt").read_text() == "mine"


def test_refusals(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drift", "talks"]) == 2
    assert "the run has no fitted space of its own" in capsys.readouterr().err
    assert main(["drift", "talks", "--space", "roles", "--layer", "5"]) == 2
    assert "has turns of layers 0 to 1." in capsys.readouterr().err
    assert main(["drift", "nowhere"]) == 2
    assert "no run here (no run.json)" in capsys.readouterr().err
    assert main(["drift", "talks", "--layers", "5"]) == 2
    assert "drift: unknown argument --layers." in capsys.readouterr().err
