"""An output folder of the reference project, looked through before anything is written: what a run of it would hold.

Responses are read role by role and not kept; of the activations only keys and shapes are read, and a digest.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from personaspace.store.errors import InputError
from personaspace.store.formats.assistant_axis import Response, read_role_responses
from personaspace.store.formats.assistant_axis_scores import response_key
from personaspace.store.formats.directions import some
from personaspace.store.formats.role_names import DEFAULT_ROLE, check_role_name, role_files
from personaspace.store.plan import PlannedRow, rollout_id
from personaspace.store.records import READ_THREADS


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRole:
    """One role of the folder."""

    id: str
    responses: Path
    activations: Path
    prompts: Mapping[int, str]
    """The file's own index of each system prompt -> the prompt, ascending."""
    rows: Mapping[str, int]
    """Key of a response -> its row, in the order of the responses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """All of the folder."""

    roles: tuple[SourceRole, ...]
    """`default` first, then by name; their rows follow one another."""
    questions: Mapping[int, str]
    """The files' own index of each question -> the question, ascending."""
    rows: tuple[PlannedRow, ...]
    """Prompts and questions as places in the lists above."""
    layers: int
    hidden: int
    digest: str
    """SHA-256 over the contents of all responses and activations."""

    def tables(self) -> dict[str, list[Mapping[str, object]]]:
        """Roles and questions as run.json has them."""
        return {
            "roles": [
                {"id": role.id, "kind": "unknown", "description": "", "prompts": list(role.prompts.values())}
                for role in self.roles
            ],
            "questions": [
                {"id": f"aa{number}", "category": "unknown", "text": text} for number, text in self.questions.items()
            ],
        }


def read_source(folder: Path, say: Callable[[str], None]) -> Source:
    """Look through FOLDER/responses and FOLDER/activations.

    Raises InputError naming file and line or key for a role that has only one of the two, responses without
    activations and the other way round, tensors that differ in shape, and responses that can't be told apart.
    """
    pairs = _pairs(folder)
    questions: dict[int, str] = {}
    roles: list[SourceRole] = []
    drafts: list[PlannedRow] = []
    seen: dict[str, str] = {}
    shape: tuple[int, int] | None = None
    say(f"{folder}: looking through {len(pairs)} roles")
    for role_id, (role, texts, tensors) in enumerate(pairs):
        responses = read_role_responses(role, texts)
        entry = _role(role, texts, tensors, responses, questions, first_row=len(drafts))
        shape = _check_shapes(entry, shape)
        roles.append(entry)
        places = {index: place for place, index in enumerate(entry.prompts)}
        for response in responses:
            before = seen.setdefault(imported_id(response), response.where)
            if before != response.where:
                raise InputError(f"{response.where}: the same response as {before}; remove one of the two.")
        drafts += [
            PlannedRow(
                row=row,
                rollout_id=imported_id(response),
                role_id=role_id,
                prompt=places[response.prompt],
                question=response.question,
                sample=0,
            )
            for row, response in zip(entry.rows.values(), responses, strict=True)
        ]
    assert shape is not None
    order = {index: place for place, index in enumerate(sorted(questions))}
    return Source(
        roles=tuple(roles),
        questions={index: questions[index] for index in order},
        rows=tuple(replace(row, question=order[row.question]) for row in drafts),
        layers=shape[0],
        hidden=shape[1],
        digest=_digest([file for _, *files in pairs for file in files]),
    )


def imported_id(response: Response) -> str:
    """Permanent id of an imported rollout, the same as where `generate.responses` imports it."""
    *messages, answer = response.conversation
    return rollout_id(response.role, messages, f"imported {answer['content']}", 0)


def _pairs(folder: Path) -> list[tuple[str, Path, Path]]:
    """(role, responses, activations), `default` first."""
    for part in ("responses", "activations"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: holds no folder `{part}`; give an output folder of the reference project.")
    texts = dict(role_files(folder / "responses", ".jsonl"))
    tensors = dict(role_files(folder / "activations", ".pt"))
    for role in texts:
        check_role_name(role, str(texts[role]))
        if role not in tensors:
            raise InputError(f"{texts[role]}: has no activations ({folder / 'activations' / role}.pt).")
    for role in tensors:
        if role not in texts:
            raise InputError(f"{tensors[role]}: has no responses ({folder / 'responses' / role}.jsonl).")
    return [(role, texts[role], tensors[role]) for role in sorted(texts, key=lambda name: (name != DEFAULT_ROLE, name))]


def _role(
    role: str, texts: Path, tensors: Path, responses: Sequence[Response], questions: dict[int, str], *, first_row: int
) -> SourceRole:
    """One role; its questions are added to ``questions``."""
    prompts: dict[int, str] = {}
    rows: dict[str, int] = {}
    places: dict[tuple[int, int], str] = {}
    for row, response in enumerate(responses, start=first_row):
        if response.label == "neg":
            raise InputError(f"{response.where}: label is 'neg'; only roles ('pos', 'default') can be imported.")
        if questions.setdefault(response.question, response.question_text) != response.question_text:
            raise InputError(f"{response.where}: question_index {response.question} has another question before.")
        system = response.system_prompt or _system(response)
        if prompts.setdefault(response.prompt, system) != system:
            raise InputError(f"{response.where}: prompt_index {response.prompt} has another system prompt before.")
        before = places.setdefault((response.prompt, response.question), response.where)
        if before != response.where:
            raise InputError(f"{response.where}: the same prompt and question as {before}; remove one of the two.")
        rows[response_key(response.label, response.prompt, response.question)] = row
    if not rows:
        raise InputError(f"{texts}: holds no responses; remove it, and its activations.")
    return SourceRole(id=role, responses=texts, activations=tensors, prompts=dict(sorted(prompts.items())), rows=rows)


def _system(response: Response) -> str:
    first = response.conversation[0]
    return first["content"] if first["role"] == "system" else ""


def _check_shapes(role: SourceRole, shape: tuple[int, int] | None) -> tuple[int, int]:
    """Shape of the role's tensors. Raises InputError if they aren't those of its responses."""
    from personaspace.store.formats.torch_files import activation_shapes

    found = activation_shapes(role.activations)
    unanswered = [key for key in found if key not in role.rows]
    if unanswered:
        raise InputError(f"{role.activations}: {some(unanswered)} have no response in {role.responses}.")
    missing = [key for key in role.rows if key not in found]
    if missing:
        raise InputError(f"{role.responses}: {some(missing)} have no activations in {role.activations}.")
    own = next(iter(found.values()))
    if shape not in (None, own):
        raise InputError(
            f"{role.activations}: its tensors are {own}, those of other roles {shape}; all must be of one model."
        )
    return own


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over `FOLDER/NAME SHA256` of each file, in the order given."""

    def line(file: Path) -> str:
        with file.open("rb") as data:
            return f"{file.parent.name}/{file.name} {hashlib.file_digest(data, 'sha256').hexdigest()}\n"

    with ThreadPoolExecutor(READ_THREADS) as threads:
        return hashlib.sha256("".join(threads.map(line, files)).encode()).hexdigest()
