"""`personaspace sweep`: which runs it makes, and what is no sweep."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.cli import main
from personaspace.config import RunConfig, load_config
from personaspace.sweep_cli import IDENTITY, dose_configs


def config(folder: Path, **sections: Any) -> RunConfig:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"id": "somewhere"}, "store": {"run": "demo"}, **sections}))
    return load_config(file)


def test_a_run_for_each_dose(tmp_path: Path) -> None:
    configs = dose_configs(config(tmp_path, steer={"source": "runs/demo"}), [1.0, -0.5, 0.0])
    assert list(configs) == [-0.5, 0.0, 1.0]
    assert [one.store.run for one in configs.values()] == ["demo.dose-0.5", "demo.dose0", "demo.dose1"]
    assert {(one.steer.method, one.steer.coefficient) for one in configs.values()} == {
        ("add", -0.5),
        ("add", 0.0),
        ("add", 1.0),
    }
    assert all(one.personas.questions[0].endswith(IDENTITY) for one in configs.values())
    assert Path(configs[0.0].personas.questions[0]).is_file()


def test_questions_of_ones_own_are_kept(tmp_path: Path) -> None:
    chosen = config(tmp_path, steer={"source": "runs/demo"}, personas={"questions": "mine.yaml", "max_questions": 3})
    [one] = dose_configs(chosen, [1.0]).values()
    assert (one.personas.questions, one.personas.max_questions) == (("mine.yaml",), 3)


@pytest.mark.parametrize(
    ("steer", "arguments", "message"),
    [
        ({}, [], "sweep: steer.source is missing"),
        ({"source": "runs/demo", "method": "ablate"}, [], "Leave steer.method, coefficient"),
        ({"source": "runs/demo", "percentile": 25.0}, [], "Leave steer.method, coefficient"),
        ({"source": "runs/demo"}, ["--doses", "1", "1.0"], "sweep --doses: one is given twice"),
        ({"source": "runs/demo"}, ["--steer.sauce", "x"], "steer.sauce"),
    ],
)
def test_refusals(
    tmp_path: Path, steer: dict[str, Any], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path, steer=steer)
    try:
        code = main(["sweep", str(tmp_path / "config.yaml"), *arguments])
    except SystemExit as error:
        code = int(str(error.code))
    assert code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
