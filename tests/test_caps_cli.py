"""`personaspace caps` as a user types it."""

from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.store.formats.capping_json import read_capping_json
from personaspace.store.local import LocalFolder
from tests.analysis.caps.small_fit import write_fitted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("caps") / "run"
    write_fitted(LocalFolder(folder))
    return str(folder)


def test_tables(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caps", run]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == (f"{run}: 8 layers; rollouts: 20 of default, 39 of roles; percentiles over 59 of them")
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["6", "7"]
    assert [row[:2] for row in rows if row and row[0].startswith("layers_")] == [
        ["layers_6:7", "6"],
        ["layers_6:8", "6-7"],
    ]
    assert "*: touches 10% of default's own rollouts or more" in out
    assert "A cap acts on each token" in out


def test_every_layer_and_a_sweep(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caps", run, "--layers", "1-2", "--sweep", "--all", "--percentiles", "10", "--over", "roles"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdigit()] == list("01234567")
    ids = [row[0] for row in rows if row and row[0].startswith("layers_")]
    assert ids[0] == "layers_1:3"
    assert "layers_4:5" in ids


def test_both_kinds_of_file_hold_the_same(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch_files = pytest.importorskip("personaspace.store.formats.torch_files")
    for ending in ("pt", "json"):
        file = tmp_path / f"capping.{ending}"
        assert main(["caps", run, "--layers", "4-6", "5-7", "--percentiles", "25", "50", "--output", str(file)]) == 0
        assert f"{file}: written, 4 experiments" in capsys.readouterr().out
    ours, theirs = read_capping_json(tmp_path / "capping.json"), torch_files.read_capping(tmp_path / "capping.pt")
    assert ours.experiments == theirs.experiments
    assert list(ours.experiments) == ["layers_4:7-p0.25", "layers_4:7-p0.5", "layers_5:8-p0.25", "layers_5:8-p0.5"]
    assert [cap.layer for cap in ours.caps("layers_5:8-p0.25")] == [5, 6, 7]
    assert all((ours.vectors[name].vector_D == theirs.vectors[name].vector_D).all() for name in ours.vectors)
    again = ["caps", run, "--output", str(tmp_path / "capping.json")]
    assert main(again) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run here"),
        (["RUN", "--layers", "6-8"], "caps --layers: 6-8; the fit has no layer 8, only 0 to 7."),
        (["RUN", "--layers", "x"], "caps --layers: 'x'; give first and last layer, such as 46-53, or one layer."),
        (
            ["RUN", "--output", "caps.csv"],
            "caps --output: caps.csv is no kind that is known; end its name in .pt or .json.",
        ),
        (["RUN", "--output", "RUN/caps.json"], "choose another place for the export."),
        (["RUN", "--store.run", "x"], "caps: unknown argument --store.run."),
    ],
)
def test_refusals(run: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caps", *(argument.replace("RUN", run) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_a_fit_without_the_suggested_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    write_fitted(LocalFolder(folder), layers=4)
    assert main(["caps", str(folder)]) == 2
    expected = "caps: the fit has none of the suggested ranges (6, 6-7 of 8 layers) whole; name some with --layers."
    assert expected in capsys.readouterr().err
    assert main(["caps", str(folder), "--layers", "1-3"]) == 0
