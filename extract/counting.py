"""A model's shape from its config: built without weights, and counted."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from personaspace.extract.anatomy import build_empty, dissect
from personaspace.extract.checkpoint import decoder_config
from personaspace.extract.config import ModelConfig
from personaspace.extract.shape import ModelShape
from personaspace.store.errors import InputError

_EXPERT = re.compile(r"(^|\.)experts\.")
"""In names of parameters of which a token meets only some."""
_BITS = {"fp8": 8.0, "finegrained_fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25}
"""Stored bits of a weight by transformers' name of a quantisation, where its config does not say."""


def read_config(model: ModelConfig) -> Any:
    """The model's config as transformers reads it: of a folder, or of a Hugging Face id, fetched if need be.

    Raises InputError where there is none. No weight is read, nor is any file hashed.
    """
    folder = Path(model.id).expanduser()
    source = str(folder) if folder.is_dir() else model.id
    try:
        return AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.id: {model.id}: no config could be read, neither from a folder nor from the Hugging Face "
            f"hub: {error}"
        ) from error


def count_shape(config: Any, name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model that ``config`` describes. Raises UnsupportedModelError where it can't be used."""
    text = decoder_config(config, name)
    backbone = build_empty(config, name, trust_remote_code)
    parts = dissect(backbone, text.num_hidden_layers)
    share = _active_experts(text)
    blocks = [_count(block, 1.0) for block in parts.blocks.children()]
    table = parts.embedding.get_parameter("weight")
    vocabulary, width = table.shape
    heads = text.num_attention_heads
    inner = _any(text, "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner") or 4 * text.hidden_size
    routed = _any(text, "num_experts_per_tok") or 1
    return ModelShape(
        name=name,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=inner * (routed if share < 1 else 1),
        heads=heads,
        kv_heads=_any(text, "num_key_value_heads") or heads,
        head_dim=_any(text, "head_dim") or text.hidden_size // heads,
        vocabulary=vocabulary,
        max_positions=getattr(text, "max_position_embeddings", None),
        block_parameters=tuple(blocks),
        active_parameters=tuple(_count(block, share) for block in parts.blocks.children()),
        embedding_parameters=table.numel(),
        head_parameters=0 if _tied(config, text) else vocabulary * width,
        eager_attention=not _takes_sdpa(parts.decoder),
        weight_bits=_quantised_bits(config),
    )


def _count(module: Any, share: float) -> int:
    return int(
        sum(weight.numel() * (share if _EXPERT.search(name) else 1.0) for name, weight in module.named_parameters())
    )


def _active_experts(text: Any) -> float:
    """Share of the routed experts that one token passes."""
    experts = _any(text, "num_experts", "num_local_experts", "n_routed_experts")
    chosen = _any(text, "num_experts_per_tok")
    return chosen / experts if experts and chosen else 1.0


def _any(text: Any, *names: str) -> int:
    """The first of these settings that the config has, or 0."""
    return next((int(value) for name in names if (value := getattr(text, name, None))), 0)


def _tied(config: Any, text: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))


def _takes_sdpa(decoder: PreTrainedModel) -> bool:
    return bool(getattr(decoder, "_supports_sdpa", False))


def _quantised_bits(config: Any) -> float:
    """Stored bits of a block's weights by the checkpoint's own `quantization_config`; 0 where it has none."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return 0.0
    given = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(given.get("quant_method", ""))
    if given.get("load_in_4bit"):
        return 4.5
    if given.get("load_in_8bit"):
        return 8.0
    return float(given.get("bits") or given.get("w_bit") or _BITS.get(method, 0.0))
