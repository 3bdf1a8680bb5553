"""A slice is loaded from the files that hold its tensors, with the same weights as from one file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from personaspace.extract.anatomy import UnsupportedModelError
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.slicing import load_slice
from tests.extract.load_from_hub import digest
from tests.models import FAMILIES, tiny_checkpoint

LAYERS = 6
STAGES = [(0, 2), (2, 5), (5, 6)]
BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
EMBEDDING = re.compile(r"(?:embed_tokens|embed_in|wte)\.weight$")


def split(source: Path, folder: Path, file_of: Callable[[str], str]) -> Checkpoint:
    """A copy whose tensors lie in several files: ``file_of`` a tensor's name."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        files.setdefault(f"{file_of(name)}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return resolve(ModelConfig(id=str(folder)))


def one_file_each(name: str) -> str:
    return name


def by_layer(name: str) -> str:
    block = BLOCK.search(name)
    return f"layer-{block[1]}" if block else "embedding" if EMBEDDING.search(name) else "rest"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_files_of_a_slice_are_needed(tmp_path: Path, family: str) -> None:
    """Every tensor, and so every expert, in a file of its own; those of other stages are not there at all."""
    whole = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path / "whole", family, layers=LAYERS))))
    for first, stop in STAGES:
        folder = tmp_path / f"{first}-{stop}"
        part = split(Path(whole.source), folder, one_file_each)
        for file in folder.glob("*.safetensors"):
            block = BLOCK.search(file.name)
            is_vision = re.search("vision|projector", file.name)
            # GPT-2 adds its positions in every stage.
            is_embedding = (EMBEDDING.search(file.stem) and first == 0) or file.stem.endswith("wpe.weight")
            if is_vision or not (first <= int(block[1]) < stop if block else is_embedding):
                file.unlink()
        got = load_slice(part, first=first, stop=stop, dtype="float32")
        assert digest(got) == digest(load_slice(whole, first=first, stop=stop, dtype="float32"))


def test_a_file_of_the_slice_that_is_gone_is_named(llama: Checkpoint, tmp_path: Path) -> None:
    part = split(Path(llama.source), tmp_path / "part", by_layer)
    (tmp_path / "part" / "layer-3.safetensors").unlink()
    load_slice(part, first=4, stop=6, dtype="float32")
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(part, first=2, stop=6, dtype="float32")
    message = str(error.value)
    assert message.startswith(f"{part.source}: transformers cannot load layers 2 to 5: ")
    assert "layer-3.safetensors" in message


def test_layers_that_are_in_no_file(llama: Checkpoint, tmp_path: Path) -> None:
    part = split(Path(llama.source), tmp_path / "part", by_layer)
    index = tmp_path / "part" / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    kept = {name: file for name, file in weight_map.items() if file != "layer-5.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    with pytest.raises(UnsupportedModelError, match="weights of layers 5 to 5 are not in the checkpoint"):
        load_slice(part, first=5, stop=6, dtype="float32")


def test_folder_without_weights(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.source, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    bare = resolve(ModelConfig(id=str(tmp_path / "bare")))
    with pytest.raises(UnsupportedModelError) as error:
        load_slice(bare, first=0, stop=6, dtype="float32")
    assert str(error.value).startswith(f"{bare.source}: transformers cannot load layers 0 to 5: Error no file named")


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma2"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one", "many"])
def test_checkpoints_of_torch_files(tmp_path: Path, family: str, sharded: bool) -> None:
    """`pytorch_model.bin`, and its shards, of which only the slice's need be there."""
    whole = resolve(ModelConfig(id=str(tiny_checkpoint(tmp_path / "whole", family, layers=LAYERS))))
    folder = tmp_path / "torch"
    shutil.copytree(whole.source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(Path(whole.source) / "model.safetensors").items():
        files.setdefault(f"{by_layer(name) if sharded else 'pytorch_model'}.bin", {})[name] = tensor
    for file, tensors in files.items():
        torch.save(tensors, folder / file)
    if sharded:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for layer in (0, 1, 4, 5):
            (folder / f"layer-{layer}.bin").unlink()
    got = load_slice(resolve(ModelConfig(id=str(folder))), first=2, stop=4, dtype="float32")
    assert digest(got) == digest(load_slice(whole, first=2, stop=4, dtype="float32"))
