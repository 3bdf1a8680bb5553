"""What a judge is asked about one rollout."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from personaspace.extract.catalogue import Role
from personaspace.store.errors import InputError

BUILTIN = {"builtin": "judge.yaml", "speaker": "judge-speaker.yaml", "harm": "judge-harm.yaml"}
"""Instructions that ship, by name."""
TEXTS = ("system", "role", "trait", "form", "reminder")
"""Keys of an instructions file, beside `version`. With `labels` there is no `trait`."""
LABELS = 4
"""That a file names, where its numbers are categories."""
_NEEDED = {"role": ("{question}", "{answer}"), "trait": ("{description}", "{question}", "{answer}")}
_PLACEHOLDER = re.compile(r"\{(role|description|question|answer)\}")
_HUNDRED = re.compile(r"\b0\b[^\n]{0,80}?\b100\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How a judge's number becomes a score of 0 to 3."""

    top: int = 3
    """Highest number that may be given: 3, or 100 as in the reference project's traits."""
    reverse: bool = False
    """The number says how far the rollout shows the opposite of what it was meant to."""

    def score(self, number: float) -> float:
        """Of a number from 0 to ``top``."""
        share = number / self.top
        return 3.0 * (1 - share if self.reverse else share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One request to a judge."""

    messages: tuple[Mapping[str, str], ...]
    """[{role, content}], ending with a user's turn."""
    scale: Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Instructions:
    """The texts of an instructions file (configs/personas/judge.yaml says what each is for)."""

    version: int
    system: str
    role: str
    trait: str
    form: str
    reminder: str
    labels: tuple[str, ...] = ()
    """What the numbers 0 to 3 stand for, where they are categories and not how far a role is played."""

    @property
    def hash(self) -> str:
        """16 hex digits over all texts."""
        named: dict[str, Any] = {name: getattr(self, name) for name in TEXTS}
        texts = json.dumps(named | {"labels": self.labels} if self.labels else named, sort_keys=True)
        return hashlib.sha256(texts.encode()).hexdigest()[:16]

    def prompt(self, role: Role, messages: Sequence[Mapping[str, str]], answer: str) -> Prompt:
        """What is asked about ``answer``, which ends the conversation ``messages``.

        A role's own instructions are sent as they are. A trait's own are about the trait, so the scores of its negative
        pole are turned round. Nothing of the persona's system prompt is shown.
        """
        values = {
            "role": role.id.removesuffix(f".{role.pole}").replace("_", " "),
            "description": role.description.rstrip("." if role.pole else "") + ("." if role.pole else ""),
            "question": conversation_text(messages),
            "answer": answer,
        }
        if role.judge and not self.labels:
            top = 100 if _HUNDRED.search(role.judge) else 3
            scale = Scale(top=top, reverse=role.pole == "negative")
            return Prompt(messages=({"role": "user", "content": _fill(role.judge, values)},), scale=scale)
        template = self.trait if role.pole and not self.labels else self.role
        text = f"{_fill(template, values).rstrip()}\n\n{self.form}".strip()
        system = ({"role": "system", "content": self.system},) if self.system else ()
        return Prompt(messages=(*system, {"role": "user", "content": text}), scale=Scale())

    def again(self, prompt: Prompt, answer: str) -> Prompt:
        """The same question once more, after an answer that could not be read."""
        said = {"role": "assistant", "content": answer[:500] or "(nothing)"}
        reminder = {"role": "user", "content": self.reminder}
        return Prompt(messages=(*prompt.messages, said, reminder), scale=prompt.scale)


def load_instructions(source: str) -> Instructions:
    """Instructions that ship, or those in a YAML file. Raises InputError naming what is missing."""
    if source in BUILTIN:
        file: Any = resources.files("personaspace") / "configs" / "personas" / BUILTIN[source]
    else:
        file = Path(source).expanduser()
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"judge.instructions: {source}: cannot be read as YAML: {error}") from error
    wanted = {"version", *TEXTS}
    if isinstance(document, dict) and "labels" in document:
        wanted = (wanted | {"labels"}) - {"trait"}
    if not isinstance(document, dict) or document.keys() != wanted:
        found = sorted(map(str, document)) if isinstance(document, dict) else document
        raise InputError(f"judge.instructions: {source}: has {found}; it needs {sorted(wanted)}.")
    labels = document.pop("labels", [])
    if labels:
        document["trait"] = ""
    if not _are_labels(labels):
        raise InputError(
            f"judge.instructions: {source}: labels is {labels!r}; give {LABELS} different names, of the numbers 0 to 3."
        )
    for name in TEXTS:
        if not isinstance(document[name], str):
            raise InputError(f"judge.instructions: {source}: {name} is {document[name]!r}; expected a text.")
        needed = () if labels and name == "trait" else _NEEDED.get(name, ())
        missing = [placeholder for placeholder in needed if placeholder not in document[name]]
        if missing:
            raise InputError(f"judge.instructions: {source}: {name} lacks {' and '.join(missing)}.")
    if not isinstance(document["version"], int):
        raise InputError(f"judge.instructions: {source}: version is {document['version']!r}; expected a whole number.")
    return Instructions(**document, labels=tuple(labels))


def _are_labels(labels: Any) -> bool:
    if not isinstance(labels, list) or not all(isinstance(label, str) and label for label in labels):
        return False
    return len(set(labels)) == len(labels) and len(labels) in (0, LABELS)


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """The user's message, or all turns with their speakers where there are several; without the system prompt."""
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in turns)


def _fill(template: str, values: Mapping[str, str]) -> str:
    # In one pass: what is put in may itself hold such words in braces.
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
