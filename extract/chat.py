"""Chat templates: messages to token ids, the same today and tomorrow, with the policy recorded."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import ModelConfig
from personaspace.store.errors import InputError

Message = dict[str, str]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_PINNED_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set told = namespace(text=format) -%}{%- for code in pinned_date -%}"
    "{%- set told.text = told.text | replace(code, pinned_date[code]) -%}{%- endfor -%}{{- told.text -}}"
    "{%- endmacro %}\n"
)
"""Before templates that ask for the time: transformers hands them its own clock, and no function of ours."""
PLAIN_STOP = "\nUser:"


class ChatFormat:
    """How one model's conversations become token ids.

    `system_policy` is `native`, or `folded` where the template refuses system messages: then the system text
    opens the first user turn.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.source, **checkpoint.loading())
        self._template = _find_template(self.tokenizer, checkpoint, config.chat_template)
        self._filling = _filling(config)
        self.stop_strings = [PLAIN_STOP] if config.chat_template == "plain" else []
        self.system_policy = "native"
        probe = [{"role": "system", "content": "Be a probe."}, {"role": "user", "content": "Who are you?"}]
        try:
            # Some templates refuse a system message, some leave it out without a word.
            if "Be a probe." not in self.render(probe, add_generation_prompt=True):
                self.system_policy = "folded"
        except TemplateError as refusal:
            self.system_policy = "folded"
            try:
                self.render(probe, add_generation_prompt=True)
            except TemplateError as error:
                raise InputError(
                    f"model.chat_template: {config.chat_template} cannot render a conversation: {error}"
                ) from refusal

    @property
    def template_hash(self) -> str:
        """Hash of the template and of everything that fills it besides the messages."""
        content = f"{self._template}\0{json.dumps(self._filling, sort_keys=True)}\0{self.system_policy}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Text of the conversation as the model sees it. Raises TemplateError if the template refuses it."""
        if self.system_policy == "folded":
            messages = fold_system(messages)
        clock = _PINNED_CLOCK if "strftime_now" in self._template else ""
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=clock + self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._filling,
            )
        except (TypeError, AttributeError, ValueError, LookupError) as error:
            # A template is a program, and may fail like one.
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return rendered

    def encode_text(self, text: str) -> list[int]:
        """Token ids of rendered text; the template already holds the BOS token where there is one."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant's response begins."""
        return self.encode_text(self.render(messages, add_generation_prompt=True))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of response tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Move a leading system message into the first user turn, separated by an empty line."""
    if [message["role"] for message in messages[:2]] != ["system", "user"]:
        return list(messages)
    system, user, *rest = messages
    return [{"role": user["role"], "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _filling(config: ModelConfig) -> dict[str, Any]:
    """What fills a template besides the messages: the date, whichever way it is asked for, and the thinking mode."""
    try:
        date = datetime.strptime(config.date_string, "%d %b %Y")
    except ValueError as error:
        raise InputError(f"model.date_string: {config.date_string!r} is no date such as '26 Jul 2024'.") from error
    codes = [f"%{flag}{code}" for code in "aAbBcdHIjmMpSUwWxXyYzZ" for flag in ("", "-")]
    filling: dict[str, Any] = {
        "date_string": config.date_string,
        "pinned_date": {code: date.strftime(code) for code in codes},
    }
    return filling if config.thinking is None else {**filling, "enable_thinking": config.thinking}


def _find_template(tokenizer: Any, checkpoint: Checkpoint, choice: str) -> str:
    if choice == "plain":
        return PLAIN_TEMPLATE
    if choice == "builtin":
        if not tokenizer.chat_template:
            raise InputError(
                f"model.chat_template: builtin, but the tokenizer of {checkpoint.source} has no chat template. "
                "Use `plain` for a base model, or give a Jinja file."
            )
        return str(tokenizer.get_chat_template())
    file = Path(choice).expanduser()
    if not file.is_file():
        raise InputError(f"model.chat_template: {choice} is no file; allowed are `builtin`, `plain`, or a Jinja file.")
    return file.read_text(encoding="utf-8")
