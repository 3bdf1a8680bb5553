"""`personaspace compare` as a user types it."""

import json
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from personaspace.cli import main
from personaspace.store.local import LocalFolder
from tests.analysis.compare.twin_runs import ROLES, write_fitted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_fitted(LocalFolder(root / "base"))
    write_fitted(LocalFolder(root / "instruct"), say="Yes", model={"template_hash": "u"})
    write_fitted(LocalFolder(root / "deep"), basis=2, layers=6, hidden=24, fitted=True)
    write_fitted(LocalFolder(root / "unfitted"), fitted=False)
    write_fitted(LocalFolder(root / "others"), roles=(ROLES[0], ROLES[11], ROLES[12]))
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_table_page_json_and_tables(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(runs / "base"), str(runs / "instruct"), "--permutations", "20"]
    assert main([*arguments, "--json", "found.json", "--tables", "tables"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "base, layer 1, and instruct, layer 1: 12 roles in common, weights: same"
    assert lines[1] == '  model.template_hash: "t" -> "u"'
    table = {line[:40].strip(): line[40:].split() for line in lines[3:10]}
    assert float(table["Linear CKA"][0]) > 0.95
    assert table["Cosine of the axes"][2:] == ["-", "above", "chance"]
    assert lines[-1] == "comparison: comparison.html"
    assert "base and instruct, compared" in (here / "comparison.html").read_text(encoding="utf-8")
    found = json.loads((here / "found.json").read_text(encoding="utf-8"))
    [pair] = found["pairs"]
    assert f"{pair['measures']['cka']:.2f}" == table["Linear CKA"][0]
    assert (pair["weights"], pair["differences"]) == ("same", [["model.template_hash", '"t"', '"u"']])
    read = [
        pyarrow.csv.read_csv(here / "tables" / "roles.csv"),
        pyarrow.parquet.read_table(here / "tables" / "roles.parquet"),
    ]
    assert [table.num_rows for table in read] == [36, 36]
    assert read[0]["position_b"].to_pylist() == pytest.approx(read[1]["position_b"].to_pylist())


def test_only_a_comparison_is_replaced(runs: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(runs / "base"), str(runs / "deep"), str(runs / "instruct"), "--permutations", "20"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.count("roles in common") == 3
    assert main(arguments) == 0, "an earlier comparison may be replaced"
    other = here / "notes.html"
    other.write_text("<p>mine</p>")
    assert main([*arguments, "--output", "notes.html"]) == 2
    assert "notes.html: exists already; choose another name, or allow it to be overwritten." in capsys.readouterr().err
    assert other.read_text() == "<p>mine</p>"
    assert main([*arguments, "--output", "notes.html", "--overwrite"]) == 0
    assert "3 runs: base, deep, instruct, compared" in other.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUNS/base"], "compare: one run; give at least two, such as runs/base runs/instruct."),
        (["RUNS/base", "RUNS/unfitted"], "RUNS/unfitted: no persona space yet; run `fit` first."),
        (["RUNS/base", "RUNS/nowhere"], "RUNS/nowhere: no run here"),
        (["RUNS/base", "RUNS/base"], "compare: RUNS/base is given twice"),
        (["RUNS/base", "RUNS/others"], "have 2 roles in common (jester, rebel); at least 3 are needed."),
        (["RUNS/base", "RUNS/deep", "--layer", "7"], "compare --layer: 7; the fit of base has layers 0 to 2."),
        (["RUNS/base", "RUNS/deep", "--permutations", "3"], "compare --permutations: 3; give at least 20."),
        (["RUNS/base", "RUNS/deep", "--components", "0"], "compare --components: 0; give at least 1."),
        (["RUNS/base", "RUNS/deep", "--store.run", "x"], "compare: unknown argument --store.run."),
    ],
)
@pytest.mark.usefixtures("here")
def test_refusals(runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *(argument.replace("RUNS", str(runs)) for argument in arguments)]) == 2
    assert message.replace("RUNS", str(runs)) in capsys.readouterr().err
    assert not Path("comparison.html").exists()
