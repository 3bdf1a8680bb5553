"""`personaspace new`: the file that it writes is a config that runs, and says what the checkpoint is like."""

import json
from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.config import RunConfig, load_config
from personaspace.store import open_run
from tests.models import CHATML, NO_SYSTEM, TRIMMING, tiny_checkpoint

THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ 'So: ' }}{% endif %}",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write(tmp_path: Path, model: Path, *options: str) -> tuple[RunConfig, str]:
    file = tmp_path / "new.yaml"
    assert main(["new", str(model), "--output", str(file), *options]) == 0
    return load_config(file), file.read_text()


@pytest.mark.nightly
def test_the_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint(tmp_path / "Tiny Chat_1")
    assert main(["new", str(model)]) == 0
    file = tmp_path / "tiny-chat_1.yaml"
    config = load_config(file)
    assert (config.store.run, config.model.dtype) == ("tiny-chat_1", "float32")
    assert config.analysis.target_layer == 3
    small = ["--personas.only", "ghost", "--personas.max-questions", "8", "--personas.prompts", "1"]
    assert main(["generate", str(file), *small, "--generate.max-new-tokens", "4"]) == 0
    assert main(["extract", str(file), *small, "--generate.max-new-tokens", "4"]) == 0
    assert open_run(tmp_path / "runs" / "tiny-chat_1").sizes["rollout"] == 16


def test_what_the_template_does_is_said(tmp_path: Path) -> None:
    for name, template, said in (
        ("chatml", CHATML, "builtin # takes a system message\n"),
        ("trimming", TRIMMING, "builtin # takes a system message; blanks around messages are stripped"),
        ("no-system", NO_SYSTEM, "builtin # system prompts open the first user turn"),
    ):
        folder = tmp_path / name
        config, text = write(tmp_path, tiny_checkpoint(folder, chat_template=template))
        assert said in text
        assert config.model.thinking is None
        (tmp_path / "new.yaml").unlink()


def test_a_thinking_switch_is_set(tmp_path: Path) -> None:
    config, text = write(tmp_path, tiny_checkpoint(tmp_path / "model", chat_template=THINKING))
    assert config.model.thinking is False
    assert "true: it reasons first" in text


def test_a_base_model_gets_the_plain_template(tmp_path: Path) -> None:
    config, _ = write(tmp_path, tiny_checkpoint(tmp_path / "base", chat_template=None))
    assert config.model.chat_template == "plain"


def test_sharding_is_planned_for_the_machines_of_the_flags(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    config, text = write(tmp_path, model, "--nodes", "2", "--gpus-per-node", "4", "--gpu", "A100")
    assert "planned for 2 nodes x 4 A100 of 79.1 GiB" in text
    assert config.store.root == "/shared/personaspace"
    assert (config.cluster.sharding, config.cluster.stages) == ("pipeline", 1)


def test_responses_leave_room_in_a_short_context(tmp_path: Path) -> None:
    config, _ = write(tmp_path, tiny_checkpoint(tmp_path / "model"))
    assert config.generate.max_new_tokens == 128  # Half of the 256 positions.


def test_a_quantised_checkpoint_is_named(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(settings))
    _, text = write(tmp_path, model)
    assert "# Quantised: transformers loads it by the quantization_config in the checkpoint." in text


def refuse(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    message = f"--output: {file} exists, and nothing is overwritten. Give another file, or remove it."
    refuse([str(tmp_path), "--output", str(file)], message, capsys)
    assert file.read_text() == "mine"


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(["a/b.yaml", "--output", "gone/x.yaml"], f"--output: the folder {tmp_path / 'gone'} does not exist;", capsys)
    refuse([str(tmp_path / "nowhere")], "does not exist; give a checkpoint folder or a Hugging Face id.", capsys)
    refuse([str(tmp_path)], f"model.id: {tmp_path} holds no config.json; give the folder of a checkpoint.", capsys)
    refuse(["nobody/nothing"], "model.id: nobody/nothing is no local folder, and the Hugging Face hub does not", capsys)
    refuse(["nobody/nothing", "--seed", "1"], "new: unknown argument --seed.", capsys)
    assert not list(tmp_path.iterdir())
