"""Text files of the public assistant-axis project (arXiv 2601.10387), as its users have them on disk, both ways.

Roles and questions are read; responses (one ROLE.jsonl per role) are read and written. Scores: `assistant_axis_scores`;
tensors: `torch_files`. The project's own generator labels every response `pos`, those of the default role too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaspace.store.errors import InputError
from personaspace.store.formats.assistant_axis_scores import response_key
from personaspace.store.formats.files import replacing, require_file
from personaspace.store.formats.json_text import parse_json
from personaspace.store.formats.role_names import check_role_name, role_files

_QUESTION_ID = re.compile(r"aa(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Persona:
    """A role's or trait's file."""

    name: str
    positive: tuple[str, ...]
    """System prompts."""
    negative: tuple[str, ...]
    """Those to the contrary, of a trait; else empty."""
    judge: str
    """Instructions for a judge, with `{question}` and `{answer}`; may be empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One line of a response file: a finished conversation of a role."""

    role: str
    """Name of the role: that of the file."""
    prompt: int
    """Index of the role's system prompt."""
    question: int
    """Index of the question."""
    question_text: str
    """The question itself."""
    label: str
    """Polarity of the prompt: `pos`, `neg` or `default`."""
    system_prompt: str = ""
    """As asked for, also where the model has no system turn and the conversation folds it into the user's."""
    conversation: tuple[dict[str, str], ...]
    """[{role, content}], ending with the assistant's turn."""
    where: str = ""
    """`FILE:LINE`, for messages; empty if not read from a file."""


def read_personas(folder: Path) -> list[Persona]:
    """What every NAME.json in ``folder`` says. Raises InputError for a file without `instruction`."""
    return [_read_persona(name, file) for name, file in role_files(folder, ".json")]


def read_questions(file: Path) -> list[tuple[str, str]]:
    """(id, text) of every line `{"question": ..., "id": ...}`."""
    questions: list[tuple[str, str]] = []
    for where, line in _json_lines(file):
        if not isinstance(line.get("question"), str):
            raise InputError(f"{where}: has keys {sorted(line)}; expected a text under `question`.")
        questions.append((f"aa{line.get('id', len(questions))}", line["question"]))
    return questions


def question_numbers(ids: Sequence[str]) -> list[int]:
    """The index that files of the project have for each question: N where all ids are `aaN`, else its place."""
    found = [_QUESTION_ID.fullmatch(question) for question in ids]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers if len(set(numbers)) == len(ids) else list(range(len(ids)))


def iter_responses(folder: Path) -> Iterator[tuple[str, list[Response]]]:
    """(role, its responses in the order of the file), one role at a time, by name of the role.

    Raises InputError naming file and line.
    """
    for role, file in role_files(folder, ".jsonl"):
        yield role, read_role_responses(role, file)


def read_role_responses(role: str, file: Path) -> list[Response]:
    """The responses of one role's file, in its order. Raises InputError naming file and line."""
    return [_response(role, where, line) for where, line in _json_lines(require_file(file))]


def read_responses(folder: Path) -> list[Response]:
    """Every response of every ROLE.jsonl in ``folder``, in file order. Raises InputError naming file and line."""
    return [response for _, responses in iter_responses(folder) for response in responses]


def write_responses(folder: Path, role: str, responses: Iterable[Response], *, overwrite: bool = False) -> Path:
    """Writes FOLDER/ROLE.jsonl, one response at a time; returns the file.

    Raises InputError for a role that is no file name, a response of another role, and two responses with one prompt
    and question: the format has no place for several samples.
    """
    file = folder / f"{check_role_name(role, str(folder))}.jsonl"
    seen: set[str] = set()
    with replacing(file, overwrite=overwrite) as temporary, temporary.open("w", encoding="ascii", newline="\n") as out:
        for number, response in enumerate(responses, start=1):
            where = f"{file}: response {number}"
            if response.role != role:
                raise InputError(f"{where}: is of role {response.role!r}; one file holds one role.")
            key = response_key(response.label, response.prompt, response.question)
            if key in seen:
                raise InputError(f"{where}: {key} is there already; the format has one sample of each, write only one.")
            seen.add(key)
            line = {
                "system_prompt": response.system_prompt,
                "prompt_index": response.prompt,
                "question_index": response.question,
                "question": response.question_text,
                "label": response.label,
                "conversation": list(_turns(where, list(response.conversation))),
            }
            out.write(json.dumps(line) + "\n")
    return file


def _response(role: str, where: str, line: dict[str, Any]) -> Response:
    missing = {"prompt_index", "question_index", "question", "label", "conversation"} - line.keys()
    if missing:
        raise InputError(f"{where}: lacks {', '.join(sorted(missing))}.")
    conversation = _turns(where, line["conversation"])
    if not isinstance(line["prompt_index"], int) or not isinstance(line["question_index"], int):
        raise InputError(f"{where}: prompt_index and question_index must be whole numbers.")
    return Response(
        role=role,
        prompt=line["prompt_index"],
        question=line["question_index"],
        question_text=str(line["question"]),
        label=str(line["label"]),
        system_prompt=str(line.get("system_prompt") or ""),
        conversation=conversation,
        where=where,
    )


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


def _read_persona(name: str, file: Path) -> Persona:
    entry = parse_json(file.read_bytes(), f"{file}: not valid JSON")
    instructions = entry.get("instruction") if isinstance(entry, dict) else None
    if not isinstance(instructions, list) or not instructions:
        found = sorted(entry) if isinstance(entry, dict) else f"a JSON {type(entry).__name__}"
        raise InputError(f'{file}: needs `instruction`, a list of {{"pos": "system prompt"}}; it has {found}.')
    poles = {pole: [item.get(pole) for item in instructions if isinstance(item, dict)] for pole in ("pos", "neg")}
    positive, negative = ([text for text in poles[pole] if isinstance(text, str)] for pole in ("pos", "neg"))
    if len(positive) < len(instructions):
        raise InputError(f"{file}: every entry of `instruction` needs a text under `pos`.")
    if negative and len(negative) < len(positive):
        raise InputError(f"{file}: a trait needs a text under `neg` in every entry of `instruction`.")
    judge = entry.get("eval_prompt", "")
    if not isinstance(judge, str):
        raise InputError(f"{file}: eval_prompt is {judge!r}; expected a text.")
    return Persona(name=name, positive=tuple(positive), negative=tuple(negative), judge=judge)


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, raw in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}:{number}"
        line = parse_json(raw, f"{where}: not a line of UTF-8 JSON")
        if not isinstance(line, dict):
            raise InputError(f"{where}: expected a JSON object.")
        yield where, line
