"""The files that hold a catalogue: the built-in one, a team's own YAML, and the reference project's."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import yaml

from personaspace.extract.catalogue import KINDS, POLES, TRAIT, Question, Role
from personaspace.store.errors import InputError
from personaspace.store.formats import assistant_axis
from personaspace.store.formats.role_names import DEFAULT_ROLE, check_role_name

BUILTIN = "builtin"
DOMAINS = ("coding", "writing", "therapy", "philosophy")
"""Of the built-in scenarios: from work to what the one who answers is."""
BEHAVIOUR = "{behaviour}"
"""Stands in a trait's frames for what it describes."""


class Named(Protocol):
    """An entry of a catalogue."""

    @property
    def id(self) -> str:
        """Permanent."""


Entry = TypeVar("Entry", bound=Named)


def load_roles(sources: Sequence[str]) -> list[Role]:
    """Roles of all ``sources``, `default` first.

    Each is `builtin`, a YAML file, or a folder of YAML files or of assistant-axis JSON files. Raises InputError naming
    the file and the entry at fault, also where two have one id.
    """
    return sorted(_ROLES.load(sources), key=lambda role: role.id != DEFAULT_ROLE)


def load_traits(sources: Sequence[str]) -> list[Role]:
    """Both poles of each trait of all ``sources`` (as for roles), the positive one first."""
    return _TRAITS.load(sources)


def load_questions(sources: Sequence[str]) -> list[Question]:
    """Questions of all ``sources``, each `builtin`, a YAML file, or an assistant-axis JSONL file."""
    questions = _QUESTIONS.load(sources)
    refuse_doubles([question.text for question in questions], "personas.questions", "question")
    return questions


def load_all(source: str) -> tuple[list[Role], list[Question]]:
    """Whatever one source holds of roles, traits (their poles) and questions."""
    path = Path(source).expanduser()
    if _QUESTIONS.reads_reference(path):
        return [], load_questions([source])
    if _ROLES.reads_reference(path):
        traits = any(persona.negative for persona in assistant_axis.read_personas(path))
        return (load_traits if traits else load_roles)([source]), []
    if source != BUILTIN and not path.exists():
        raise InputError(f"{source} does not exist; give `builtin`, a file or a folder.")
    keys = {key for _, document in documents(source) for key in document}
    roles = load_roles([source]) if "roles" in keys else []
    roles += load_traits([source]) if "traits" in keys else []
    questions = load_questions([source]) if "questions" in keys else []
    if not roles and not questions and "scenarios" not in keys:
        raise InputError(f"{source}: holds no lists under `roles:`, `traits:` or `questions:`.")
    return roles, questions


def builtin_version() -> int:
    """Of the built-in catalogue; it rises whenever a text in it changes."""
    return max(int(document["version"]) for _, document in documents(BUILTIN))


@dataclass(frozen=True, kw_only=True, slots=True)
class Form(Generic[Entry]):
    """How one sort of entries is written down."""

    setting: str
    """That names its sources."""
    key: str
    """Of the list in a YAML file, and the built-in file's or folder's name."""
    parse: Callable[[dict[str, Any], str, Mapping[str, Any]], list[Entry]]
    """An entry of that list, where it stands, and its document."""
    reference: str
    """What else may be read, such as `an assistant-axis folder`."""
    read_reference: Callable[[Path], list[Entry]]

    def load(self, sources: Sequence[str]) -> list[Entry]:
        """The entries of all sources. Raises InputError where two have one id."""
        source_of: dict[str, str] = {}
        loaded: list[Entry] = []
        for source in sources:
            for entry in self._read(source):
                if entry.id in source_of:
                    both = dict.fromkeys((source_of[entry.id], source))
                    raise InputError(
                        f"{self.setting}: id {entry.id} appears more than once, in {' and '.join(both)}; each must be "
                        "unique."
                    )
                source_of[entry.id] = source
                loaded.append(entry)
        return loaded

    def _read(self, source: str) -> list[Entry]:
        path = Path(source).expanduser()
        if self.reads_reference(path):
            return self.read_reference(path)
        if source != BUILTIN and not path.exists():
            raise InputError(
                f"{self.setting}: {source} does not exist; give `builtin`, a YAML file, a folder of YAML files, or "
                f"{self.reference}."
            )
        listed = [(where, document) for where, document in documents(source) if self.key in document]
        if not listed:
            raise InputError(f"{self.setting}: {source} has no list under `{self.key}:`.")
        return [entry for where, document in listed for entry in self._entries(where, document)]

    def reads_reference(self, path: Path) -> bool:
        """Whether the path is the reference project's, and none of YAML files."""
        if self.reference.endswith("JSONL file"):
            return path.is_file() and path.suffix == ".jsonl"
        return path.is_dir() and not any(path.glob("*.yaml"))

    def _entries(self, where: str, document: Mapping[str, Any]) -> list[Entry]:
        entries = document[self.key]
        if not isinstance(entries, list):
            raise InputError(f"{where}: `{self.key}` is {entries!r}; expected a list.")
        found: list[Entry] = []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise InputError(f"{where}: {self.key}[{number}] is {entry!r}; expected a mapping with an `id`.")
            found += self.parse(entry, f"{where}: {self.key}[{number}]", document)
        return found


def documents(source: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, content) of each YAML file of a source. Raises InputError for what is no YAML."""
    path = Path(source).expanduser()
    files: list[tuple[str, Traversable]]
    if source == BUILTIN:
        folder = resources.files("personaspace") / "configs" / "personas"
        names = [*(f"roles/{kind}.yaml" for kind in KINDS), "traits.yaml", "questions.yaml"]
        names += [f"scenarios/{domain}.yaml" for domain in DOMAINS]
        files = [(f"configs/personas/{name}", folder.joinpath(name)) for name in names]
    else:
        files = [(str(file), file) for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    return [(where, _parse(where, file)) for where, file in files]


def _parse(where: str, file: Traversable) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{where}: holds {document!r}; expected lists under `roles:`, `traits:` or `questions:`.")
    return document


def _parse_role(entry: dict[str, Any], where: str, _: Mapping[str, Any]) -> list[Role]:
    optional = {"kind": "unknown", "description": "", "judge": ""}
    fields = read_fields(entry, where, required=("id", "prompts"), optional=optional, lists=("prompts",))
    check_role_name(fields["id"], where)
    refuse_doubles(fields["prompts"], f"{where}: {fields['id']!r}", "prompt")
    return [Role(**{**fields, "prompts": tuple(fields["prompts"])})]


def _parse_trait(entry: dict[str, Any], where: str, document: Mapping[str, Any]) -> list[Role]:
    poles = [pole for pole in POLES if isinstance(entry.get(pole), list)]
    fields = read_fields(entry, where, required=("id", *POLES), optional={"judge": ""}, lists=poles)
    frames = document.get("frames", [f"In everything you write, you {BEHAVIOUR}."])
    if not isinstance(frames, list) or not all(isinstance(frame, str) and BEHAVIOUR in frame for frame in frames):
        raise InputError(f"{where}: frames is {frames!r}; give a list of texts that hold {BEHAVIOUR}.")
    return _poles(
        check_role_name(fields["id"], where),
        {
            pole: fields[pole] if pole in poles else [frame.replace(BEHAVIOUR, fields[pole]) for frame in frames]
            for pole in POLES
        },
        {pole: "" if pole in poles else fields[pole] for pole in POLES},
        judge=fields["judge"],
    )


def _parse_question(entry: dict[str, Any], where: str, _: Mapping[str, Any]) -> list[Question]:
    return [Question(**read_fields(entry, where, required=("id", "text"), optional={"category": "unknown"}, lists=()))]


def _read_reference_roles(folder: Path) -> list[Role]:
    personas = assistant_axis.read_personas(folder)
    for found in personas:
        if found.negative:
            raise InputError(
                f"{folder}/{found.name}.json: is a trait, with texts under `neg`; give its folder in personas.traits."
            )
    return [
        Role(id=found.name, kind="unknown", description="", prompts=found.positive, judge=found.judge)
        for found in personas
    ]


def _read_reference_traits(folder: Path) -> list[Role]:
    poles: list[Role] = []
    for found in assistant_axis.read_personas(folder):
        if not found.negative:
            raise InputError(f"{folder}/{found.name}.json: a trait needs a text under `neg` in `instruction`.")
        prompts = {"positive": found.positive, "negative": found.negative}
        poles += _poles(found.name, prompts, dict.fromkeys(POLES, ""), judge=found.judge)
    return poles


def _read_reference_questions(file: Path) -> list[Question]:
    return [Question(id=name, category="unknown", text=text) for name, text in assistant_axis.read_questions(file)]


def _poles(
    name: str, prompts: Mapping[str, Sequence[str]], descriptions: Mapping[str, str], *, judge: str = ""
) -> list[Role]:
    return [
        Role(
            id=f"{name}.{pole}",
            kind=TRAIT,
            description=descriptions[pole],
            prompts=tuple(prompts[pole]),
            pole=pole,
            judge=judge,
        )
        for pole in POLES
    ]


def read_fields(
    entry: dict[str, Any],
    where: str,
    *,
    required: Sequence[str],
    optional: Mapping[str, str],
    lists: Sequence[str],
) -> dict[str, Any]:
    """An entry's texts, and its lists of texts, with defaults filled in. Raises InputError."""
    missing, unknown = set(required) - entry.keys(), entry.keys() - {*required, *optional}
    if missing or unknown:
        raise InputError(
            f"{where} has {sorted(map(str, entry))}; it needs {sorted(required)}"
            + (f", and may have {sorted(optional)}." if optional else ".")
        )
    for name, value in entry.items():
        if name in lists:
            if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
                raise InputError(f"{where}.{name} is {value!r}; give a list of at least one text.")
        elif not isinstance(value, str):
            raise InputError(f"{where}.{name} is {value!r}; expected a text.")
    return {**optional, **entry}


def refuse_doubles(texts: Sequence[str], where: str, what: str) -> None:
    double = sorted(text for text, count in Counter(texts).items() if count > 1)
    if double:
        raise InputError(f"{where}: {what} {double[0]!r} appears more than once; each must be unique.")


_ROLES = Form(
    setting="personas.roles",
    key="roles",
    parse=_parse_role,
    reference="an assistant-axis folder",
    read_reference=_read_reference_roles,
)
_TRAITS = Form(
    setting="personas.traits",
    key="traits",
    parse=_parse_trait,
    reference="an assistant-axis folder",
    read_reference=_read_reference_traits,
)
_QUESTIONS = Form(
    setting="personas.questions",
    key="questions",
    parse=_parse_question,
    reference="an assistant-axis JSONL file",
    read_reference=_read_reference_questions,
)
