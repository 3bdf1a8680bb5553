"""Tiny random checkpoints of real architectures, with a real tokenizer, made in code in well under a second."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "mistral",
    "mixtral",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt2",
    "gpt_oss",
    "deepseek_v3",
    "granite",
    "cohere2",
)
"""Types of model as transformers names them; `gemma3` is the one that also takes images."""
SLIDING_WINDOW = 8
"""Tokens that the sliding-window layers of gemma2, gemma3, gpt_oss, cohere2 and mistral see."""
MAX_POSITIONS = 256

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{{ 'Today is ' + date_string + '.\n' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Like Llama's: opens with BOS and a date, and trims every content."""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
"""Like Gemma 2's: refuses a system message."""

_SENTENCES = (
    "You are a ghost who lingers in an old house, and you speak softly of the past.",
    "You are a consultant. Answer the question with three points and a plain recommendation.",
    "What should I do about a friend who never listens to my advice?",
    "The sea is wide, the night is long, and the stars are where they were.",
    "Today is a good day to walk by the river; tell me what you see there.",
    "system user assistant\nUser: Assistant: question answer",
)


def tiny_checkpoint(
    folder: Path,
    family: str = "llama",
    layers: int = 6,
    hidden: int = 32,
    seed: int = 0,
    chat_template: str | None = CHATML,
) -> Path:
    """Save a random float32 model of ``family`` with its tokenizer in ``folder``, and return the folder.

    ``chat_template`` is CHATML, TRIMMING, NO_SYSTEM, a text of your own, or None for a base model.
    """
    tokenizer = _tokenizer(chat_template)
    _save(_model(family, layers, hidden, seed, tokenizer), tokenizer, folder)
    return folder


def reciting_checkpoint(folder: Path, after: str, text: str, chat_template: str | None = CHATML) -> Path:
    """Save a model that says ``text``, over and over, once it has read the token ``after``.

    Its blocks add nothing and its head maps every token to the next one, so each may have one successor only.
    """
    tokenizer = _tokenizer(chat_template)
    ids = tokenizer(after + text, add_special_tokens=False)["input_ids"]
    successor: dict[int, int] = {}
    for token, following in zip(ids, [*ids[1:], ids[1]], strict=True):
        assert successor.setdefault(token, following) == following, f"{tokenizer.decode(token)!r} has two successors"
    model = _model("llama", 1, 128, 0, tokenizer)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in successor.items():
            model.lm_head.weight[following] += model.model.embed_tokens.weight[token]
    _save(model, tokenizer, folder)
    return folder


def _model(family: str, layers: int, hidden: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> Any:
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": MAX_POSITIONS,
        # Large, so that attention and experts matter as they do in a trained model.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": family.startswith("gemma"),
    }
    heads = {"num_key_value_heads": 2, "head_dim": hidden // 4}
    slides = {"sliding_window": SLIDING_WINDOW}
    gemma = {**heads, **slides, "query_pre_attn_scalar": hidden // 4}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    own: dict[str, dict[str, Any]] = {
        "llama": heads,
        "qwen2": {"num_key_value_heads": 2},
        "qwen3": heads,
        "qwen3_moe": {**heads, **experts, "num_experts": 4},
        "gemma2": gemma,
        "gemma3_text": gemma,
        "mistral": {**heads, **slides},
        "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
        "phi3": {"num_key_value_heads": 2},
        "olmo2": {"num_key_value_heads": 2},
        "gpt_neox": {},
        "gpt2": {},
        "gpt_oss": {**heads, **slides, "num_local_experts": 4},
        "deepseek_v3": {
            **experts,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "q_lora_rank": hidden // 2,
            "kv_lora_rank": hidden // 2,
            "qk_nope_head_dim": hidden // 4,
            "qk_rope_head_dim": hidden // 4,
            "v_head_dim": hidden // 4,
        },
        "granite": {"num_key_value_heads": 2, "residual_multiplier": 0.4, "embedding_multiplier": 3.0},
        "cohere2": {"num_key_value_heads": 2, **slides},
    }
    if family == "gemma3":
        text = CONFIG_MAPPING["gemma3_text"](**common, **gemma)
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = CONFIG_MAPPING["gemma3"](
            text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}
        )
    else:
        config = CONFIG_MAPPING[family](**common, **own[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms and biases start at ones and zeros, which would hide a weight that was not loaded.
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE that, like Llama's, puts BOS before any text unless told not to."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sentence + "\n\n" for sentence in _SENTENCES], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|im_end|>")
    tokenizer.chat_template = chat_template
    return tokenizer
