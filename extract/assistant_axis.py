"""Reading the files of the public assistant-axis project (arXiv 2601.10387), as its users have them on disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaspace.store.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One line of a response file: a finished conversation of a role."""

    role: str
    prompt: int
    question: int
    question_text: str
    label: str
    """Polarity of the prompt: `pos`, `neg` or `default`."""
    conversation: tuple[dict[str, str], ...]
    """[{role, content}], ending with the assistant's turn."""
    where: str
    """`FILE:LINE`, for messages."""


def read_roles(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(role, system prompts) of every ROLE.json in ``folder``. Raises InputError for a file without `instruction`."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(f"{folder}: holds no ROLE.json files.")
    return [(file.stem, _read_prompts(file)) for file in files]


def read_questions(file: Path) -> list[tuple[str, str]]:
    """(id, text) of every line `{"question": ..., "id": ...}`."""
    questions: list[tuple[str, str]] = []
    for where, line in _json_lines(file):
        if not isinstance(line.get("question"), str):
            raise InputError(f"{where}: has keys {sorted(line)}; expected a text under `question`.")
        questions.append((f"aa{line.get('id', len(questions))}", line["question"]))
    return questions


def read_responses(folder: Path) -> list[Response]:
    """Every response of every ROLE.jsonl in ``folder``, in file order. Raises InputError naming file and line."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise InputError(f"generate.responses: {folder} holds no ROLE.jsonl files.")
    responses = []
    for file in files:
        for where, line in _json_lines(file):
            missing = {"prompt_index", "question_index", "question", "label", "conversation"} - line.keys()
            if missing:
                raise InputError(f"{where}: lacks {', '.join(sorted(missing))}.")
            conversation = _turns(where, line["conversation"])
            if not isinstance(line["prompt_index"], int) or not isinstance(line["question_index"], int):
                raise InputError(f"{where}: prompt_index and question_index must be whole numbers.")
            responses.append(
                Response(
                    role=file.stem,
                    prompt=line["prompt_index"],
                    question=line["question_index"],
                    question_text=str(line["question"]),
                    label=str(line["label"]),
                    conversation=conversation,
                    where=where,
                )
            )
    return responses


def _turns(where: str, conversation: Any) -> tuple[dict[str, str], ...]:
    """A checked conversation, without the empty system message that the reference writes where there is none."""
    if not isinstance(conversation, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in conversation
    ):
        raise InputError(f'{where}: the conversation must be a list of {{"role": text, "content": text}}.')
    if not conversation or conversation[-1]["role"] != "assistant":
        raise InputError(f"{where}: the conversation does not end with an assistant turn.")
    return tuple(turn for turn in conversation if turn["role"] != "system" or turn["content"])


def _read_prompts(file: Path) -> tuple[str, ...]:
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from error
    instructions = entry.get("instruction") if isinstance(entry, dict) else None
    if not isinstance(instructions, list) or not instructions:
        found = sorted(entry) if isinstance(entry, dict) else f"a JSON {type(entry).__name__}"
        raise InputError(f'{file}: needs `instruction`, a list of {{"pos": "system prompt"}}; it has {found}.')
    prompts = [item["pos"] for item in instructions if isinstance(item, dict) and isinstance(item.get("pos"), str)]
    if len(prompts) < len(instructions):
        raise InputError(f"{file}: every entry of `instruction` needs a text under `pos`.")
    return tuple(prompts)


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, raw in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}:{number}"
        try:
            line = json.loads(raw.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"{where}: not a line of UTF-8 JSON: {error}") from error
        if not isinstance(line, dict):
            raise InputError(f"{where}: expected a JSON object.")
        yield where, line
