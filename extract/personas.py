"""Personas: the catalogue of roles and questions, and the plan that crosses them into rows.

Ids of roles and questions are permanent. The plan's order (roles one after another, each with its prompts,
questions and samples) decides the rows of the arrays.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from personaspace.extract.config import PersonasConfig
from personaspace.store.errors import InputError
from personaspace.store.formats import assistant_axis
from personaspace.store.formats.role_names import DEFAULT_ROLE
from personaspace.store.plan import rollout_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A persona that the model is asked to take on."""

    id: str
    """Permanent name, such as `ghost`."""
    kind: str
    """professional, everyday, dramatic, fantastical, abstract; `assistant` for default; `unknown` if imported."""
    description: str
    """One sentence."""
    prompts: tuple[str, ...]
    """System prompts; an empty one means no system message. `{model_name}` is substituted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Something that every role is asked."""

    id: str
    """Permanent name, such as `q017`."""
    category: str
    """What it is about; `unknown` if imported."""
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRollout:
    """One row of the run: indices into the plan's tables, and the conversation to continue."""

    row: int
    role_id: int
    prompt: int
    question: int
    sample: int
    rollout_id: str
    messages: tuple[dict[str, str], ...]
    """[{role, content}], ending with the user's turn. Empty for a rollout of the run that the config lacks."""
    response: str | None = None
    """The finished response, where it is imported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaPlan:
    """Roles, questions and the rows made of them, in the order of the rollout axis."""

    roles: tuple[Role, ...]
    questions: tuple[Question, ...]
    rows: tuple[PlannedRollout, ...]

    def rows_per_role(self) -> list[int]:
        counts = Counter(row.role_id for row in self.rows)
        return [counts[role_id] for role_id in range(len(self.roles))]


def plan_personas(config: PersonasConfig, *, model_name: str, generation: str) -> PersonaPlan:
    """Load roles and questions and cross them.

    ``model_name`` fills `{model_name}` in prompts; ``generation`` describes the sampling and enters every
    rollout id. Raises InputError naming the file and the entry at fault.
    """
    roles = select_roles(load_roles(config.roles), config.only)
    questions = load_questions(config.questions)[: config.max_questions]
    if not questions:
        raise InputError(f"personas.questions: {config.questions} holds no questions; at least one is needed.")
    rows: list[PlannedRollout] = []
    for role_id, role in enumerate(roles):
        samples = config.default_samples if role.id == DEFAULT_ROLE else config.samples
        prompts = [prompt.replace("{model_name}", model_name) for prompt in role.prompts[: config.prompts]]
        for prompt, question, sample in _pairs(config.pairing, len(prompts), len(questions), samples):
            messages = _messages(prompts[prompt], questions[question].text)
            rows.append(
                PlannedRollout(
                    row=len(rows),
                    role_id=role_id,
                    prompt=prompt,
                    question=question,
                    sample=sample,
                    rollout_id=rollout_id(role.id, messages, generation, sample),
                    messages=messages,
                )
            )
    return PersonaPlan(roles=tuple(roles), questions=tuple(questions), rows=tuple(rows))


def plan_imported(folder: Path) -> PersonaPlan:
    """The plan of finished assistant-axis responses: rows in the order of their files, `default` first.

    Raises InputError naming FILE:LINE for responses to negative trait prompts, which are no roles, for doubled
    responses, and where one index stands for two questions or prompts.
    """
    responses = assistant_axis.read_responses(folder)
    names = sorted({response.role for response in responses}, key=lambda name: (name != DEFAULT_ROLE, name))
    texts: dict[int, str] = {}
    prompts: dict[str, dict[int, str]] = {name: {} for name in names}
    seen: dict[str, str] = {}
    ids = []
    for response in responses:
        *messages, answer = response.conversation
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        ids.append(rollout_id(response.role, messages, f"imported {answer['content']}", 0))
        if response.label == "neg":
            raise InputError(f"{response.where}: label is 'neg'; only roles ('pos', 'default') can be imported.")
        if texts.setdefault(response.question, response.question_text) != response.question_text:
            raise InputError(f"{response.where}: question_index {response.question} has another question before.")
        if prompts[response.role].setdefault(response.prompt, system) != system:
            raise InputError(f"{response.where}: prompt_index {response.prompt} has another system prompt before.")
        if seen.setdefault(ids[-1], response.where) != response.where:
            raise InputError(f"{response.where}: the same response as {seen[ids[-1]]}; remove one of the two.")
    questions = sorted(texts)
    ordered = sorted(zip(ids, responses, strict=True), key=lambda pair: names.index(pair[1].role))
    return PersonaPlan(
        roles=tuple(
            Role(id=name, kind="unknown", description="", prompts=tuple(dict(sorted(prompts[name].items())).values()))
            for name in names
        ),
        questions=tuple(Question(id=f"aa{number}", category="unknown", text=texts[number]) for number in questions),
        rows=tuple(
            PlannedRollout(
                row=row,
                role_id=names.index(response.role),
                prompt=sorted(prompts[response.role]).index(response.prompt),
                question=questions.index(response.question),
                sample=0,
                rollout_id=permanent_id,
                messages=response.conversation[:-1],
                response=response.conversation[-1]["content"],
            )
            for row, (permanent_id, response) in enumerate(ordered)
        ),
    )


def load_roles(source: str) -> list[Role]:
    """Roles from `builtin`, a YAML file, or a folder of assistant-axis JSON files; `default` first."""
    path = Path(source).expanduser()
    if source == "builtin":
        roles = _parse_roles(_builtin("roles.yaml"), "configs/personas/roles.yaml")
    elif path.is_dir():
        roles = [
            Role(id=name, kind="unknown", description="", prompts=prompts)
            for name, prompts in assistant_axis.read_roles(path)
        ]
    elif path.is_file():
        roles = _parse_roles(_read(path), str(path))
    else:
        raise InputError(f"personas.roles: {source} does not exist; give `builtin`, a YAML file, or a folder of JSONs.")
    _refuse_duplicates([role.id for role in roles], f"personas.roles: {source}", "role id")
    for role in roles:
        _refuse_duplicates(role.prompts, f"personas.roles: {source}: role {role.id!r}", "prompt")
    return sorted(roles, key=lambda role: role.id != DEFAULT_ROLE)


def load_questions(source: str) -> list[Question]:
    """Questions from `builtin`, a YAML file, or an assistant-axis JSONL file."""
    path = Path(source).expanduser()
    if source == "builtin":
        questions = _parse_questions(_builtin("questions.yaml"), "configs/personas/questions.yaml")
    elif not path.is_file():
        raise InputError(f"personas.questions: {source} does not exist; give `builtin`, a YAML file, or a JSONL file.")
    elif path.suffix == ".jsonl":
        questions = [Question(id=i, category="unknown", text=text) for i, text in assistant_axis.read_questions(path)]
    else:
        questions = _parse_questions(_read(path), str(path))
    _refuse_duplicates([question.id for question in questions], f"personas.questions: {source}", "question id")
    _refuse_duplicates([question.text for question in questions], f"personas.questions: {source}", "question")
    return questions


def select_roles(roles: list[Role], only: Sequence[str]) -> list[Role]:
    """The roles named by ``only`` and `default`; all if it is empty. Raises InputError for unknown names."""
    known = {role.id for role in roles}
    unknown = sorted(set(only) - known)
    if unknown:
        raise InputError(f"personas.only: unknown role {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    if DEFAULT_ROLE not in known:
        raise InputError(f"personas.roles: no role `{DEFAULT_ROLE}`; the axis is measured against it, so add one.")
    chosen = [role for role in roles if not only or role.id in only or role.id == DEFAULT_ROLE]
    if len(chosen) < 2:
        raise InputError("personas: `default` alone spans no space; use at least one more role.")
    return chosen


def _pairs(pairing: str, prompts: int, questions: int, samples: int) -> Iterator[tuple[int, int, int]]:
    """(prompt, question, sample) of one role, in row order."""
    if pairing == "cross":
        for prompt in range(prompts):
            for question in range(questions):
                for sample in range(samples):
                    yield prompt, question, sample
    else:
        for question in range(questions):
            for sample in range(samples):
                yield (question + sample) % prompts, question, sample


def _messages(system: str, question: str) -> tuple[dict[str, str], ...]:
    user = {"role": "user", "content": question}
    return ({"role": "system", "content": system}, user) if system else (user,)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error


def _builtin(name: str) -> str:
    return (resources.files("personaspace") / "configs" / "personas" / name).read_text(encoding="utf-8")


def _parse_roles(text: str, where: str) -> list[Role]:
    roles = []
    for entry in _entries(text, where, "roles", {"id": str, "kind": str, "description": str, "prompts": list}):
        prompts = entry["prompts"]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(
                f"{where}: role {entry['id']!r}: prompts is {prompts!r}; give a list of at least one text."
            )
        roles.append(Role(id=entry["id"], kind=entry["kind"], description=entry["description"], prompts=tuple(prompts)))
    return roles


def _parse_questions(text: str, where: str) -> list[Question]:
    fields = {"id": str, "category": str, "text": str}
    return [Question(**entry) for entry in _entries(text, where, "questions", fields)]


def _entries(text: str, where: str, key: str, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The list under ``key`` of a YAML text, each entry a mapping with exactly ``fields``."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    entries = document.get(key) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{where}: needs a list under `{key}:`.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.keys() != fields.keys():
            found = sorted(map(str, entry)) if isinstance(entry, dict) else entry
            raise InputError(f"{where}: {key}[{number}] has {found!r}; it needs exactly {sorted(fields)}.")
        for name, expected in fields.items():
            if not isinstance(entry[name], expected):
                raise InputError(f"{where}: {key}[{number}].{name} is {entry[name]!r}; expected {expected.__name__}.")
    return entries


def _refuse_duplicates(ids: Sequence[str], where: str, what: str) -> None:
    double = sorted(name for name, count in Counter(ids).items() if count > 1)
    if double:
        raise InputError(f"{where}: {what} {', '.join(double)} appears more than once; each must be unique.")
