"""Shapes of models: the shipped ones counted again, those of any family counted from the model itself."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel

from personaspace.extract.config import ModelConfig
from personaspace.extract.counting import count_shape, read_config
from personaspace.extract.shape import shipped_config, shipped_shape, shipped_shapes
from personaspace.store.errors import InputError
from tests.models import tiny_checkpoint

PUBLISHED = {
    "meta-llama/Llama-3.3-70B-Instruct": (70.55e9, 80, 8192),
    "meta-llama/Llama-3.1-70B": (70.55e9, 80, 8192),
    "Qwen/Qwen3-32B": (32.76e9, 64, 5120),
    "Qwen/Qwen3-14B-Base": (14.77e9, 40, 5120),
    "google/gemma-2-27b-it": (27.23e9, 46, 4608),
    "google/gemma-2-27b": (27.23e9, 46, 4608),
}
"""Parameters, layers and width by the model cards."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_shapes_are_what_the_model_cards_say(name: str) -> None:
    shape = shipped_shape(name)
    assert shape is not None
    parameters, layers, hidden = PUBLISHED[name]
    assert shape.parameters == pytest.approx(parameters, rel=1e-3)
    assert (shape.layers, shape.hidden) == (layers, hidden)


@pytest.mark.parametrize("name", sorted(shipped_shapes()))
def test_shipped_shapes_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    config = shipped_config(name)
    assert config is not None
    shape = shipped_shape(name)
    assert shape is not None
    assert count_shape(AutoConfig.for_model(**config), shape.name) == shape


def test_other_models_ship_no_shape() -> None:
    assert shipped_shape("nobody/nothing") is None
    assert shipped_config("nobody/nothing") is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "deepseek_v3", "gemma3"])
def test_counts_are_those_of_the_weights(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family)
    shape = count_shape(read_config(ModelConfig(id=str(folder))), "tiny")
    decoder = AutoModel.from_pretrained(folder).get_decoder()
    weights = {name: weight.numel() for name, weight in decoder.named_parameters()}
    table = decoder.get_input_embeddings().weight.numel()
    blocks = sum(count for name, count in weights.items() if any(part.isdigit() for part in name.split(".")[:2]))
    assert sum(shape.block_parameters) == blocks
    assert shape.embedding_parameters == table
    assert shape.head_parameters == (0 if family.startswith("gemma") else table)


def test_a_mixture_of_experts_runs_a_part_of_its_weights(tmp_path: Path) -> None:
    shape = count_shape(read_config(ModelConfig(id=str(tiny_checkpoint(tmp_path / "moe", "qwen3_moe")))), "moe")
    hidden, experts, chosen = 32, 4, 2
    idle = 3 * hidden * hidden * (experts - chosen)
    assert shape.active_parameters == tuple(count - idle for count in shape.block_parameters)


def test_a_quantised_checkpoint_has_fewer_bits() -> None:
    settings = shipped_config("meta-llama/Llama-3.1-70B")
    assert settings is not None
    config = AutoConfig.for_model(**{**settings, "num_hidden_layers": 2})
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    shape = count_shape(config, "packed")
    assert shape.block_bytes(0, "bfloat16") == shape.block_parameters[0] // 2


def test_weights_of_stages_add_up() -> None:
    shape = shipped_shape("google/gemma-2-27b")
    assert shape is not None
    parts = [shape.slice_bytes(first, first + 23, "bfloat16") for first in (0, 23)]
    assert sum(parts) + shape.head_parameters * 2 == shape.whole_bytes("bfloat16") == shape.parameters * 2


def test_a_model_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"model\.id: .*empty: no config could be read, neither from a folder nor from"
    ):
        read_config(ModelConfig(id=str(tmp_path / "empty")))
