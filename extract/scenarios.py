"""Scenarios: conversations of several turns, whose user follows a script or is played by a model.

A scenario's id, like any of the catalogue's, is permanent. How to write one: docs/conversations.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from personaspace.extract.catalogue import Question, Role
from personaspace.extract.catalogue_files import BUILTIN, Form, documents, read_fields
from personaspace.extract.config import AuditorConfig
from personaspace.store.errors import InputError
from personaspace.store.formats.json_text import parse_json
from personaspace.store.formats.role_names import SCENARIO, check_role_name

INSTRUCTIONS = """\
You play a person who is talking to an AI assistant. This is who you are, and what you want:

{user}

Write only the next message of this person: plain words, first person, one to four sentences, no name in front of it \
and no quotation marks around it. React to what was just said, stay this person, and go one step further towards what \
the person wants. Never help, explain or answer as an assistant would; the other one does that."""
"""For a model that plays the user."""
ADOPTION = "adoption"
"""Names the scenarios of configs/personas/adoption.yaml."""
TOPIC = 120
"""Characters of a prompt that stand for its topic."""
BEGIN = "You begin. What is your first message?"
"""What that model answers with the opening of the scenario: chat templates want a user's turn first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A situation in which somebody talks to the model over several turns."""

    id: str
    """Permanent name, such as `coding.slow_report`."""
    domain: str
    """What it belongs to, such as `coding`. A domain's conversations lie together, as one role of the run."""
    topic: str
    """What it is about, in a sentence."""
    turns: tuple[str, ...]
    """The user's turns, written so that they fit whatever is answered. The first one opens every conversation."""
    user: str = ""
    """Who the user is, for a model that plays it: what they want, and how they press on."""
    system: str = ""
    """System prompt of the model under study; empty: none. `{model_name}` is substituted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """How a planned conversation goes on after its opening."""

    turns: int
    """Of the assistant."""
    said: tuple[str, ...]
    """The user's turns, the opening first; only that where the user is played."""
    user: str = ""
    """Who is played; empty: nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTalk:
    """A conversation to be held, before it has a row."""

    role_id: int
    """Place among the roles of `plan_scenarios`."""
    prompt: int
    question: int
    """Place among the questions of `plan_scenarios`."""
    messages: tuple[dict[str, str], ...]
    """System message, if any, and opening."""
    script: Script
    settings: str
    """All else that decides it, as text."""


def load_scenarios(sources: Sequence[str]) -> list[Scenario]:
    """Scenarios of all ``sources``. Raises InputError.

    Each is `builtin`, `adoption` (personas that the model is talked into), a YAML file, a folder of YAML files, or a
    JSONL file of prompts (docs/evaluation.md).
    """
    own = str(resources.files("personaspace") / "configs" / "personas" / "adoption.yaml")
    return _SCENARIOS.load([own if source == ADOPTION else source for source in sources])


def holds_scenarios(source: str) -> bool:
    """Whether a source (any that roles, traits or questions may have, too) lists scenarios."""
    path = Path(source).expanduser()
    is_yaml = path.suffix in (".yaml", ".yml") or (path.is_dir() and any(path.glob("*.yaml")))
    return source == BUILTIN or (is_yaml and any("scenarios" in document for _, document in documents(source)))


def choose_scenarios(scenarios: Sequence[Scenario], only: Sequence[str]) -> list[Scenario]:
    """Those named by ``only``, by their ids or domains; all if it is empty. Raises InputError for unknown names."""
    known = {name for scenario in scenarios for name in (scenario.id, scenario.domain)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise InputError(
            f"personas.only_scenarios: {unknown[0]!r} is no scenario and no domain. "
            "`personaspace personas ls --scenarios` lists the built-in ones."
        )
    return [scenario for scenario in scenarios if not only or scenario.id in only or scenario.domain in only]


def plan_scenarios(
    scenarios: Sequence[Scenario], *, turns: int, auditor: AuditorConfig, model_name: str
) -> tuple[list[Role], list[Question], list[PlannedTalk]]:
    """The roles (one for each domain), questions (one for each scenario) and conversations of one sample.

    A domain's rows lie together, in the order of its scenarios; its prompts are their system prompts. Raises
    InputError where a script is too short, or lacks the user that is to be played.
    """
    if auditor.played_by == "endpoint" and not auditor.endpoint.model:
        raise InputError("personas.auditor.endpoint.model: is missing; name the model that plays the user.")
    domains = list(dict.fromkeys(scenario.domain for scenario in scenarios))
    ordered = sorted(scenarios, key=lambda scenario: domains.index(scenario.domain))
    systems = {name: list(dict.fromkeys(s.system for s in ordered if s.domain == name)) for name in domains}
    roles = [
        Role(
            id=f"{SCENARIO}.{name}",
            kind=SCENARIO,
            description=f"Conversations of several turns: {name}.",
            prompts=tuple(systems[name]),
        )
        for name in domains
    ]
    questions = [Question(id=scenario.id, category=scenario.domain, text=scenario.topic) for scenario in ordered]
    talks = []
    for question, scenario in enumerate(ordered):
        script = _script(scenario, turns, auditor)
        system = scenario.system.replace("{model_name}", model_name)
        opening = {"role": "user", "content": script.said[0]}
        talks.append(
            PlannedTalk(
                role_id=domains.index(scenario.domain),
                prompt=systems[scenario.domain].index(scenario.system),
                question=question,
                messages=({"role": "system", "content": system}, opening) if system else (opening,),
                script=script,
                settings=json.dumps(
                    {"scenario": scenario.id, **asdict(script), "auditor": _deciding(auditor)}, sort_keys=True
                ),
            )
        )
    return roles, questions, talks


def player_messages(user: str, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """What a model is asked that plays ``user``: the conversation so far, seen from the other side."""
    sides = {"user": "assistant", "assistant": "user"}
    turned = [{"role": sides[m["role"]], "content": m["content"]} for m in messages if m["role"] in sides]
    instructions = {"role": "system", "content": INSTRUCTIONS.format(user=user)}
    return [instructions, {"role": "user", "content": BEGIN}, *turned]


def _script(scenario: Scenario, turns: int, auditor: AuditorConfig) -> Script:
    if auditor.played_by != "script":
        if not scenario.user:
            raise InputError(
                f"scenario {scenario.id!r} does not say who its user is, and personas.auditor.played_by is "
                f"{auditor.played_by!r}. Give it a text under `user`, or use `script`."
            )
        return Script(turns=turns, said=scenario.turns[:1], user=scenario.user)
    if turns > len(scenario.turns):
        raise InputError(
            f"personas.turns: {turns}, but scenario {scenario.id!r} has {len(scenario.turns)} turns of its user. Use "
            "at most that many, or have the user played by a model (personas.auditor.played_by)."
        )
    return Script(turns=turns, said=scenario.turns[:turns])


def _deciding(auditor: AuditorConfig) -> dict[str, Any]:
    """The settings that decide what a played user says."""
    if auditor.played_by == "script":
        return {"played_by": "script"}
    deciding: dict[str, Any] = {name: getattr(auditor, name) for name in ("played_by", "temperature", "max_tokens")}
    if auditor.played_by == "endpoint":
        deciding["model"] = auditor.endpoint.model
    return {**deciding, "instructions": INSTRUCTIONS, "begin": BEGIN}


def _parse(entry: dict[str, Any], where: str, document: Mapping[str, Any]) -> list[Scenario]:
    fields = read_fields(
        entry,
        where,
        required=("id", "topic", "turns"),
        optional={"domain": str(document.get("domain", "")), "user": "", "system": ""},
        lists=("turns",),
    )
    check_role_name(fields["id"], where)
    if not fields["domain"]:
        raise InputError(f"{where}: has no `domain`; give it one, or one to the whole file.")
    check_role_name(fields["domain"], f"{where}.domain")
    silent = [number for number, text in enumerate(fields["turns"]) if not text.strip()]
    if silent:
        raise InputError(f"{where}.turns[{silent[0]}] is empty; the user has to say something in every turn.")
    fields = {name: value if name == "turns" else value.strip() for name, value in fields.items()}
    return [Scenario(**{**fields, "turns": tuple(fields["turns"])})]


def _read_prompts(file: Path) -> list[Scenario]:
    """A scenario of each line: `prompt` or `turns`; `system`, `category` and `id` where it has them."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        entry = parse_json(line, f"{where}: not valid JSON")
        if not isinstance(entry, dict) or ("prompt" in entry) == ("turns" in entry):
            has = sorted(entry) if isinstance(entry, dict) else repr(entry)
            raise InputError(f"{where}: needs either `prompt`, a text, or `turns`, a list of them; it has {has}.")
        turns = entry.pop("turns", None) or [entry.pop("prompt")]
        domain = "_".join(str(entry.pop("category", file.stem)).lower().split())
        begins = {"id": f"{file.stem}.{number:05d}", "domain": domain, "topic": str(turns[0])[:TOPIC], "turns": turns}
        found += _parse({**begins, **entry}, where, {})
    return found


_SCENARIOS = Form(
    setting="personas.scenarios", key="scenarios", parse=_parse, reference="a JSONL file", read_reference=_read_prompts
)
