"""Tiny random checkpoints of models that are no plain decoders: refused, or read in part."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel

from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig

_COMMON = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
OTHERS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 6, "num_heads": 4},
    "bert": _COMMON,
    "modernbert": {**_COMMON, "local_attention": 8, "global_attn_every_n_layers": 3},
    "gptj": {"vocab_size": 400, "n_positions": 256, "n_embd": 32, "n_layer": 6, "n_head": 4, "rotary_dim": 4},
    "phi": _COMMON,
    "opt": {
        "vocab_size": 400,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 256,
    },
    "xglm": {
        "vocab_size": 400,
        "d_model": 32,
        "num_layers": 6,
        "attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 256,
    },
    "zamba2": {
        **_COMMON,
        "tie_word_embeddings": False,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "num_mem_blocks": 1,
        "use_mem_rope": False,
    },
    "mamba": {**{key: _COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}, "state_size": 8},
    "llama4_text": {
        **_COMMON,
        **_HEADS,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        "interleave_moe_layer_step": 2,
    },
    "gemma3n_text": {
        **_COMMON,
        **_HEADS,
        "vocab_size_per_layer_input": 400,
        "hidden_size_per_layer_input": 8,
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "activation_sparsity_pattern": [0.0] * 6,
    },
}


def other_checkpoint(folder: Path, model_type: str) -> Checkpoint:
    """Save a random model without a head, and no tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(CONFIG_MAPPING[model_type](**OTHERS[model_type])).save_pretrained(folder)
    return resolve(ModelConfig(id=str(folder)))
