"""`personaspace sweep`: which runs it makes, and what is no sweep."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.cli import main
from personaspace.config import RunConfig, load_config
from personaspace.sweep_cli import IDENTITY, cap_configs, dose_configs


def config(folder: Path, **sections: Any) -> RunConfig:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"id": "somewhere"}, "store": {"run": "demo"}, **sections}))
    return load_config(file)


def test_a_run_for_each_dose(tmp_path: Path) -> None:
    configs = dose_configs(config(tmp_path, steer={"source": "runs/demo"}), [1.0, -0.5, 0.0])
    assert list(configs) == ["dose -0.5", "dose 0", "dose 1"]
    assert [one.store.run for one in configs.values()] == ["demo.dose-0.5", "demo.dose0", "demo.dose1"]
    assert {(one.steer.method, one.steer.coefficient) for one in configs.values()} == {
        ("add", -0.5),
        ("add", 0.0),
        ("add", 1.0),
    }
    assert all(one.personas.questions[0].endswith(IDENTITY) for one in configs.values())
    assert Path(configs["dose 0"].personas.questions[0]).is_file()


def test_questions_of_ones_own_are_kept(tmp_path: Path) -> None:
    chosen = config(tmp_path, steer={"source": "runs/demo"}, personas={"questions": "mine.yaml", "max_questions": 3})
    [one] = dose_configs(chosen, [1.0]).values()
    assert (one.personas.questions, one.personas.max_questions) == (("mine.yaml",), 3)


def test_a_run_as_it_is_and_one_for_each_cap(tmp_path: Path) -> None:
    talks = {"roles": [], "scenarios": "adoption", "turns": 3}
    chosen = config(tmp_path, steer={"source": "runs/demo", "layers": "3-4"}, personas=talks)
    configs = cap_configs(chosen, [25.0, 50.0])
    assert list(configs) == ["as it is", "cap p50", "cap p25"]
    assert [one.store.run for one in configs.values()] == ["demo.plain", "demo.cap50", "demo.cap25"]
    assert [one.steer.percentile for one in configs.values()] == [None, 50.0, 25.0]
    assert [one.steer.source for one in configs.values()] == [None, "runs/demo", "runs/demo"]
    assert {one.extract.reductions for one in configs.values()} == {("mean", "turns")}
    assert {one.judge.instructions for one in configs.values()} == {"speaker"}
    single = cap_configs(replace(chosen, personas=replace(chosen.personas, turns=1)), [25.0])
    assert {one.extract.reductions for one in single.values()} == {("mean",)}


@pytest.mark.parametrize(
    ("steer", "arguments", "message"),
    [
        ({}, [], "sweep: steer.source is missing"),
        ({"source": "runs/demo", "method": "ablate"}, [], "Leave steer.method, coefficient"),
        ({"source": "runs/demo", "percentile": 25.0}, [], "Leave steer.method, coefficient"),
        ({"source": "runs/demo"}, ["--doses", "1", "1.0"], "sweep --doses: one is given twice"),
        ({"source": "runs/demo"}, ["--doses", "1", "--caps", "2"], "not allowed with argument"),
        ({"source": "runs/demo"}, ["--caps", "25", "25.0"], "sweep --caps: takes different percentiles"),
        ({"source": "runs/demo"}, ["--caps", "100"], "sweep --caps: takes different percentiles"),
        ({"source": "runs/demo", "percentile": 25.0}, ["--caps", "50"], "Leave steer.method, coefficient"),
        ({"source": "runs/demo"}, ["--judge.model", "m", "--judge.instructions", "no.yaml"], "no.yaml: cannot be read"),
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
