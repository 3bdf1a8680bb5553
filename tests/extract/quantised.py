"""Tiny quantised checkpoints: as DeepSeek, OpenAI and llm-compressor write them, or made by libraries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from tests.models import tiny_checkpoint

PLAIN = "model.layers.1.mlp.down_proj"
"""A module that is left as it was, by its name in the model with its head."""
E4M3_MAX = 448.0


def fp8(folder: Path) -> Checkpoint:
    """Float8 weights with one scale per block of 128 x 128, as DeepSeek V3's."""

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().max() / E4M3_MAX
        return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}

    skipped = ["lm_head", PLAIN]
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": skipped}
    return _by_hand(folder, "llama", config, lambda name: name.endswith("_proj.weight") and PLAIN not in name, quantise)


def mxfp4(folder: Path) -> Checkpoint:
    """Experts of two 4-bit floats per byte, 32 of them with one exponent, as gpt-oss's."""

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        experts, inputs, outputs = weight.shape
        draw = torch.Generator().manual_seed(inputs)
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(122, 127, (experts, outputs, inputs // 32), generator=draw, dtype=torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return _by_hand(folder, "gpt_oss", config, lambda name: name.endswith("experts.gate_up_proj"), quantise)


def int8_compressed(folder: Path) -> Checkpoint:
    """Int8 weights with one scale per row, activations with one per token, as llm-compressor writes them."""

    def quantise(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale_O1 = weight.abs().amax(1, keepdim=True) / 127
        return {name: (weight / scale_O1).round().to(torch.int8), f"{name}_scale": scale_O1}

    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel"},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", PLAIN],
    }
    return _by_hand(folder, "llama", config, lambda name: name.endswith("_proj.weight") and PLAIN not in name, quantise)


def bitsandbytes(folder: Path, bits: int, threshold: float = 0.0) -> Checkpoint:
    """Quantised by bitsandbytes and saved by transformers; 8 bits with columns above ``threshold`` left in 16 bits."""
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", PLAIN]
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skipped)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
    return _by_library(folder, config)


def torchao(folder: Path) -> Checkpoint:
    """Int8 weights by torchao, saved by transformers."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head", PLAIN])
    return _by_library(folder, config)


def _by_hand(
    folder: Path,
    family: str,
    quantization: dict[str, Any],
    chosen: Callable[[str], bool],
    quantise: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> Checkpoint:
    tiny_checkpoint(folder, family)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= quantise(name, tensor) if chosen(name) else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return resolve(ModelConfig(id=str(folder)))


def _by_library(folder: Path, config: Any) -> Checkpoint:
    plain = tiny_checkpoint(folder / "plain", hidden=128)
    tiny_checkpoint(folder / "quantised", hidden=128)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "quantised")
    return resolve(ModelConfig(id=str(folder / "quantised")))
