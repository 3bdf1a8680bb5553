"""What a checkpoint's chat template does with what it is given, found by rendering probes."""

from dataclasses import dataclass, replace
from typing import Literal

from transformers import AutoTokenizer

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import ModelConfig

_SPACED = "  Who are you?  "


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateFacts:
    """How conversations become text."""

    choice: Literal["builtin", "plain"]
    """For `model.chat_template`: `plain` where the tokenizer has no template of its own."""
    folds_system: bool
    """It takes no system message, so that system prompts open the first user turn."""
    trims: bool
    """It strips blanks around a message."""
    thinking_switch: bool
    """It can be asked for reasoning, or for none."""


def examine_template(checkpoint: Checkpoint, model: ModelConfig) -> TemplateFacts:
    """Render probes. Raises InputError where the template can't render a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **checkpoint.loading())
    choice: Literal["builtin", "plain"] = "builtin" if tokenizer.chat_template else "plain"
    model = replace(model, chat_template=choice, thinking=None)
    chat = ChatFormat(checkpoint, model)
    probe = [{"role": "user", "content": _SPACED}]
    asked = [
        ChatFormat(checkpoint, replace(model, thinking=thinking)).render(probe, add_generation_prompt=True)
        for thinking in (False, True)
    ]
    return TemplateFacts(
        choice=choice,
        folds_system=chat.system_policy == "folded",
        trims=_SPACED not in chat.render(probe, add_generation_prompt=True),
        thinking_switch=asked[0] != asked[1],
    )
