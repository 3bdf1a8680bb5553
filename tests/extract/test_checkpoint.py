"""Finding a checkpoint: what it is, and how one that can't be used is refused before anything is loaded."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from personaspace.store.errors import InputError
from tests.models import MAX_POSITIONS, tiny_checkpoint


def test_local_folder(llama: Checkpoint) -> None:
    folder = Path(llama.source)
    assert folder.is_absolute()
    assert (llama.name, llama.revision) == (folder.name, None)
    assert (llama.layers, llama.hidden, llama.max_positions) == (6, 32, MAX_POSITIONS)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= llama.files.keys()
    assert llama.loading() == {"revision": None, "trust_remote_code": False}


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_dimensions_of_other_families(tmp_path: Path, family: str) -> None:
    checkpoint = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path, family, layers=3, hidden=16))))
    assert (checkpoint.layers, checkpoint.hidden, checkpoint.max_positions) == (3, 16, MAX_POSITIONS)


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {resolve(ModelConfig(id=text)).source for text in ("model", "./model", "~/model")} == {str(folder)}


def test_hash_of_a_file_changes_with_the_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    before = resolve(ModelConfig(id=str(folder)))
    assert resolve(ModelConfig(id=str(folder))) == before
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("{# changed #}")
    after = resolve(ModelConfig(id=str(folder)))
    assert {name for name in before.files if before.files[name] != after.files[name]} == {"chat_template.jinja"}
    tiny_checkpoint(folder, layers=1, seed=1)
    assert resolve(ModelConfig(id=str(folder))).files["model.safetensors"] != before.files["model.safetensors"]


def refusal(config: ModelConfig) -> str:
    with pytest.raises(InputError) as error:
        resolve(config)
    return str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "~/no-such-folder", "./no-such-folder", "no/such/folder"])
def test_missing_folder(name: str) -> None:
    expected = f"model.id: {name} does not exist; give a checkpoint folder or a Hugging Face id."
    assert refusal(ModelConfig(id=name)) == expected


def test_folder_without_config(tmp_path: Path) -> None:
    expected = f"model.id: {tmp_path} holds no config.json; give the folder of a checkpoint."
    assert refusal(ModelConfig(id=str(tmp_path))) == expected


@pytest.mark.parametrize("content", ["not JSON", "{}", '{"model_type": "no_such_model"}'])
def test_config_that_transformers_cannot_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert refusal(ModelConfig(id=str(tmp_path))).startswith(
        f"model.id: {tmp_path}: transformers cannot read its config: "
    )


def test_model_without_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    assert refusal(ModelConfig(id=str(tmp_path))).startswith(f"model.id: {tmp_path}")


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_hub_in_offline_mode(monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    at = " at revision v1.0" if revision else ""
    assert refusal(ModelConfig(id="nobody/nothing", revision=revision)).startswith(
        f"model.id: nobody/nothing is no local folder, and the Hugging Face hub does not give it{at}: "
    )


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refusal(ModelConfig(id="nobody/nothing")).startswith("model.id: nobody/nothing is no local folder")


def test_name_that_is_no_hub_id() -> None:
    assert refusal(ModelConfig(id="no spaces allowed")).startswith("model.id: no spaces allowed is no local folder")
