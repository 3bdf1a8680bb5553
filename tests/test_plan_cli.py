"""`personaspace plan`: the command, with shipped shapes and with a model of this machine."""

import json
import os
from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.extract.precision import machine_dtype
from tests.models import tiny_checkpoint

CONFIGS = Path(__file__).parent.parent / "configs"
CLUSTER = ["--nodes", "1", "--gpus-per-node", "8"]


LAPTOP = ("demo.yaml", "catalogue-smollm2.yaml")
"""Configs that are for one small machine."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster to plan for, and no network to ask."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "file", sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / name for name in LAPTOP}), ids=lambda f: f.name
)
def test_shipped_configs_fit_the_machines_that_they_are_written_for(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    assert main(["plan", str(file), *CLUSTER, "--price", "2.5", "--json", str(plan)]) == 0
    shown = capsys.readouterr().out
    assert "1 node x 8 H100 of 79.1 GiB (as described by flags)" in shown
    assert "GPU-hours" in shown
    assert "at 2.5 each" in shown
    document = json.loads(plan.read_text())
    extraction = document["extraction"]
    assert extraction["sharding"] == "pipeline"
    assert 1 < extraction["replicas"] * len(extraction["stages"]) <= 8
    assert not any("nearest" in warning for warning in document["warnings"])
    stated = file.read_text()
    assert f"target_layer: {22 if 'gemma' in file.name else document['shape']['layers'] // 2}" in stated
    assert (
        f"ray job submit --address http://HEAD:8265 --working-dir . -- python -m personaspace run configs/{file.name}"
        in stated
    )


def test_a_tiny_model_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"model: {{id: {model}, dtype: float32}}\ngenerate: {{max_new_tokens: 8, batch_rows: 24}}\n"
        "personas: {only: [ghost], max_questions: 8, pairing: cycle}\n"
    )
    assert main(["plan", str(config), "--cluster.stages", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"1 node x {os.cpu_count()} CPU cores" in shown
    assert "a core measured here:" in shown
    assert "16 rollouts of 2 roles" in shown
    assert "x 2 stage(s)" in shown
    assert "core-hours" in shown
    assert sorted(tmp_path.iterdir()) == [model, config]
    assert main(["plan", str(config), "--generate.capture"]) == 0
    shown = capsys.readouterr().out
    assert "nothing: activations are captured while generating" in shown
    assert "for extraction" not in shown


def test_auto_is_what_the_machines_of_the_plan_compute_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model: {{id: {tiny_checkpoint(tmp_path / 'model')}}}\npersonas: {{only: [ghost]}}\n")
    for machines, dtype in (
        (["--flops", "1e11", "--bandwidth", "1e10"], machine_dtype("cpu")),
        (["--nodes", "1"], "bfloat16"),
    ):
        assert main(["plan", str(config), *machines]) == 0
        assert f", 6 layers x 32, {dtype}, " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "RTX 9999", "--nodes", "1"], "--gpu: 'RTX 9999' is not known here. Known: A100-40GB, A100, H100,"),
        (["--nodes", "0"], "--nodes: 0; give 1 or more."),
        (["--nodes", "1", "--gpu-memory", "much"], "'much' is no amount of memory; give one such as 80GiB."),
        (["--nodes", "1", "--cluster.device", "cpu"], "cluster.device: cpu, but the machines to plan for have GPUs"),
        (["--nodes", "1", "--model.id", "nobody/nothing"], "model.id: nobody/nothing: no config could be read"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "llama-3.3-70b.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unknown_model_names_those_that_need_no_download(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "qwen-3-32b.yaml"), *CLUSTER, "--model.id", "nobody/nothing"]) == 2
    assert "No download is needed for Qwen/Qwen3-14B, Qwen/Qwen3-14B-Base, Qwen/Qwen3-32B," in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "1.5", "half"])
def test_shares_lie_between_nothing_and_all(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(CONFIGS / "qwen-3-32b.yaml"), "--peak-share", value])
    assert f"argument --peak-share: '{value}' is no" in capsys.readouterr().err
