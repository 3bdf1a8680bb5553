"""A decoder's parts are found from the model itself, or it is refused; nothing is guessed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from personaspace.extract.anatomy import (
    Anatomy,
    UnsupportedModelError,
    check_supported,
    dissect,
    empty_model,
    states_of,
)
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from tests.extract.others import other_checkpoint
from tests.models import FAMILIES, tiny_checkpoint

EMBEDDINGS = {"gpt_neox": "embed_in", "gpt2": "wte"}
BLOCKS = {"gpt2": "h"}
NORMS = {"gpt_neox": "final_layer_norm", "gpt2": "ln_f"}


def tiny(folder: Path, family: str, layers: int = 2) -> Checkpoint:
    return resolve(ModelConfig(id=str(tiny_checkpoint(folder, family, layers=layers))))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(tmp_path: Path, family: str) -> None:
    checkpoint = tiny(tmp_path, family)
    check_supported(checkpoint)
    model = empty_model(checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())
    decoder = model.language_model if family == "gemma3" else model
    assert dissect(model, 2) == Anatomy(
        decoder=decoder,
        embedding=decoder.get_submodule(EMBEDDINGS.get(family, "embed_tokens")),
        blocks=decoder.get_submodule(BLOCKS.get(family, "layers")),
        norm_path=NORMS.get(family, "norm"),
    )


def test_the_module_tree_says_what_the_plan_says(tmp_path: Path) -> None:
    model = empty_model(tiny(tmp_path / "llama", "llama"))
    planned = dissect(model, 2)
    assert "layers" in model.config.base_model_pp_plan
    model.config.base_model_pp_plan = None
    assert dissect(model, 2) == planned
    assert not getattr(empty_model(tiny(tmp_path / "gpt2", "gpt2")).config, "base_model_pp_plan", None)


def test_the_plan_decides_between_lists_of_equal_length(tmp_path: Path) -> None:
    model = empty_model(tiny(tmp_path, "llama"))
    model.others = nn.ModuleList(nn.Identity() for _ in range(2))
    assert dissect(model, 2).blocks is model.layers


class Towers(PreTrainedModel):
    """A model that transformers has no plan for: lists of blocks, and perhaps something behind them."""

    config_class = PreTrainedConfig

    def __init__(self, *lengths: int) -> None:
        super().__init__(PreTrainedConfig())
        self.embedding = nn.Embedding(3, 4)
        for number, length in enumerate(lengths):
            setattr(self, f"tower{number}", nn.ModuleList(nn.Identity() for _ in range(length)))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def test_shallowest_list_of_the_right_length() -> None:
    model = Towers(3, 4)
    model.tower1[0] = Towers(4)
    assert dissect(model, 4).blocks is model.tower1


def test_a_list_further_down() -> None:
    model = Towers()
    model.inside = Towers(4)
    model.inside.last_norm = nn.LayerNorm(4)
    found = dissect(model, 4)
    assert found.blocks is model.inside.tower0
    assert found.norm_path == "inside.last_norm"


@pytest.mark.parametrize(("lengths", "found"), [((), 0), ((3,), 0), ((4, 4), 2)])
def test_no_guess(lengths: tuple[int, ...], found: int) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        dissect(Towers(*lengths), 4)
    assert str(error.value) == (
        f"Towers: found {found} lists of 4 blocks, expected one; this architecture is not supported."
    )


def test_the_norm_is_the_last_one_behind_the_blocks() -> None:
    model = Towers(4)
    assert dissect(model, 4).norm_path is None
    model.projection = nn.Linear(4, 4)
    model.rotary = nn.Identity()
    assert dissect(model, 4).norm_path is None
    model.first_norm = nn.RMSNorm(4)
    model.second_norm = nn.LayerNorm(4)
    model.head = nn.Linear(4, 4, bias=False)
    assert dissect(model, 4).norm_path == "second_norm"
    before = Towers()
    before.norm_of_embeddings = nn.LayerNorm(4)
    before.tower0 = nn.ModuleList(nn.Identity() for _ in range(4))
    assert dissect(before, 4).norm_path is None


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    checkpoint = other_checkpoint(tmp_path, "t5")
    with pytest.raises(UnsupportedModelError) as error:
        check_supported(checkpoint)
    assert str(error.value) == "T5Model: an encoder-decoder; only decoder-only language models can be used."


def test_a_type_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "emu3_text_model", "num_hidden_layers": 2, "hidden_size": 8})
    )
    with pytest.raises(UnsupportedModelError) as error:
        check_supported(resolve(ModelConfig(id=str(tmp_path))))
    assert str(error.value).startswith(
        f"{tmp_path}: transformers has no model for emu3_text_model: Unrecognized configuration class"
    )


def test_states_of() -> None:
    states = torch.ones(1, 2, 3)
    assert states_of(states) is states
    assert states_of((states, None)) is states


def test_an_empty_model_is_of_the_class_that_is_loaded(llama: Checkpoint) -> None:
    assert type(empty_model(llama)) is type(AutoModel.from_pretrained(llama.source))
