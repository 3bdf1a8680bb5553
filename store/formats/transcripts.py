"""Transcript files of the public assistant-axis project (arXiv 2601.10387): one JSON for each conversation.

Only `conversation` has to be there; who wrote it and what it is about are read where the file says so. `store export
--format transcripts` writes the same files, with a scenario and a sample besides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaspace.store.errors import InputError
from personaspace.store.formats.json_text import parse_json
from personaspace.store.formats.role_names import check_role_name

UNKNOWN = "unknown"
"""Domain of a transcript that names none."""
SCRIPTED = "script"
"""In place of an auditor's name, where the user followed a script."""
_TEXTS = ("model", "auditor_model", "domain", "persona", "topic", "scenario", "conversation_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Transcript:
    """A finished conversation of several turns, as its file has it."""

    name: str
    """Its scenario, else its conversation id, else its place in the folder: unique, and fit for a file name."""
    domain: str
    """What it belongs to, such as `coding`; `unknown` where nothing says so."""
    topic: str
    """What it is about; the first thing the user said where nothing says so."""
    sample: int
    """Repetition of the same scenario; 0 where there is but one."""
    conversation: tuple[dict[str, str], ...]
    """[{role, content}], a system message first if there is one, an assistant's turn last."""
    origin: Mapping[str, Any]
    """Who wrote it, as far as is known: `written_by`, `user` (`played_by`, `model`, `persona`) and `steering`."""
    where: str
    """The file, for messages."""


def is_transcripts(path: Path) -> bool:
    """Whether ``path`` is a JSON file, or a folder with such files (at any depth) and none of responses."""
    if path.is_file():
        return path.suffix == ".json"
    return not any(path.glob("*.jsonl")) and any(path.rglob("*.json"))


def read_transcripts(path: Path) -> list[Transcript]:
    """The transcript in a file, or those of all JSON files in a folder and its folders, by path.

    Raises InputError naming the file that is no transcript, or that has the same name and sample as another.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    if not files:
        raise InputError(f"{path}: holds no transcripts (.json).")
    root = path.parent if path.is_file() else path
    read = [_transcript(file, ".".join(file.relative_to(root).with_suffix("").parts)) for file in files]
    seen: dict[tuple[str, int], str] = {}
    for transcript in read:
        key = (transcript.name, transcript.sample)
        if seen.setdefault(key, transcript.where) != transcript.where:
            raise InputError(
                f"{transcript.where}: is {transcript.name!r}, sample {transcript.sample}, and so is {seen[key]}; give "
                "one of the two another `conversation_id`, or remove it."
            )
    return read


def first_turns(conversation: tuple[dict[str, str], ...], turns: int | None) -> tuple[dict[str, str], ...]:
    """The conversation up to the end of its assistant's turn number ``turns``; all of it where it has no more."""
    ends = [place + 1 for place, message in enumerate(conversation) if message["role"] == "assistant"]
    return conversation if turns is None or len(ends) <= turns else conversation[: ends[turns - 1]]


def _transcript(file: Path, place: str) -> Transcript:
    where = str(file)
    entry = parse_json(file.read_bytes(), f"{where}: not valid JSON")
    found = entry.get("conversation") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(found, list):
        has = sorted(entry) if isinstance(entry, dict) else f"a JSON {type(entry).__name__}"
        raise InputError(f'{where}: needs `conversation`, a list of {{"role": text, "content": text}}; it has {has}.')
    for name in _TEXTS:
        if not isinstance(entry.get(name, ""), str):
            raise InputError(f"{where}: `{name}` is {entry[name]!r}; expected a text.")
    sample = entry.get("sample", 0)
    if not isinstance(sample, int) or sample < 0:
        raise InputError(f"{where}: `sample` is {sample!r}; expected a number from 0 on.")
    conversation = _messages(where, found)
    asked = next((message["content"] for message in conversation if message["role"] == "user"), "")
    auditor = entry.get("auditor_model")
    user = {
        "played_by": SCRIPTED if auditor == SCRIPTED else auditor and "endpoint",
        "model": None if auditor == SCRIPTED else auditor,
        "persona": entry.get("persona"),
    }
    origin = {
        "written_by": entry.get("model"),
        "user": {name: text for name, text in user.items() if text},
        "steering": entry.get("steering_config"),
    }
    return Transcript(
        name=check_role_name(entry.get("scenario") or entry.get("conversation_id") or place, f"{where}: name"),
        domain=check_role_name(entry.get("domain") or UNKNOWN, f"{where}: domain"),
        topic=entry.get("topic") or asked,
        sample=sample,
        conversation=conversation,
        origin={name: value for name, value in origin.items() if value},
        where=where,
    )


def _messages(where: str, found: list[Any]) -> tuple[dict[str, str], ...]:
    """The messages up to the last answer, without one that waits for its answer and without an empty system turn."""
    for number, message in enumerate(found):
        texts = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f'{where}: message {number} is not {{"role": text, "content": text}}.')
    messages = [{"role": message["role"], "content": message["content"]} for message in found]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise InputError(f"{where}: no assistant's turn in the conversation, so there is nothing to average.")
    return tuple(message for message in messages if message["role"] != "system" or message["content"])
