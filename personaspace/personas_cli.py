"""`personaspace personas ...`: look at the catalogue, check it, and take over the reference project's folders."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personaspace.extract.catalogue import KINDS, POLES, Question, Role, trait_of
from personaspace.extract.catalogue_files import BUILTIN, builtin_version, load_all
from personaspace.extract.scenarios import Scenario, holds_scenarios, load_scenarios
from personaspace.store.errors import InputError
from personaspace.store.manifest import catalogue_hash

EPILOG = """\
examples:
  personaspace personas ls --kind fantastical
  personaspace personas ls --traits
  personaspace personas ls --scenarios --kind therapy
  personaspace personas show ghost calm q017
  personaspace personas validate my-roles.yaml
  personaspace personas import assistant-axis/data/roles my-roles.yaml

A role of your own is one entry in a YAML file, and `personas.roles: [builtin, my-roles.yaml]` in the config:

  roles:
    - id: lighthouse_keeper
      description: Keeper of a lighthouse before it was automated; patient, exact, fond of weather.
      prompts: ["You keep the light.", "Speak as a lighthouse keeper after forty winters on the rock."]"""


def add_personas(commands: Any) -> None:
    """Add `personas` and what it can do to the command line's parser."""
    personas = commands.add_parser(
        "personas",
        help="ls, show, validate, import: the catalogue of roles, traits, questions and scenarios",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = personas.add_subparsers(dest="action", required=True, metavar="ACTION")
    sources = "YAML files, folders of them, or assistant-axis folders and JSONL files (default: the built-in catalogue)"

    ls = actions.add_parser("ls", help="list roles, traits, questions or scenarios", allow_abbrev=False)
    ls.add_argument("sources", nargs="*", default=[BUILTIN], metavar="SOURCE", help=sources)
    ls.add_argument(
        "--kind", help=f"only roles of this kind: {', '.join(KINDS)}; or questions or scenarios of this category"
    )
    which = ls.add_mutually_exclusive_group()
    which.add_argument("--traits", action="store_true", help="traits instead of roles")
    which.add_argument("--questions", action="store_true", help="questions instead of roles")
    which.add_argument("--scenarios", action="store_true", help="conversations of several turns instead of roles")

    show = actions.add_parser("show", help="one or more entries in full, with their prompts", allow_abbrev=False)
    show.add_argument("ids", nargs="+", metavar="ID")
    show.add_argument("--from", dest="sources", nargs="+", default=[BUILTIN], metavar="SOURCE", help=sources)

    validate = actions.add_parser(
        "validate", help="check a catalogue; exit code 2 if something is wrong", allow_abbrev=False
    )
    validate.add_argument("sources", nargs="*", default=[BUILTIN], metavar="SOURCE", help=sources)

    importing = actions.add_parser(
        "import", help="write an assistant-axis folder (roles or traits) or JSONL file (questions) as YAML"
    )
    importing.add_argument("source", metavar="SOURCE")
    importing.add_argument("file", type=Path, metavar="FILE.yaml")


def run_personas(parsed: argparse.Namespace, flags: Sequence[str]) -> int:
    """Carry out one action and return the exit code."""
    if flags:
        raise InputError(f"personas {parsed.action}: unknown argument {flags[0]}. See `personaspace personas --help`.")
    if parsed.action == "ls":
        return _ls(parsed)
    if parsed.action == "show":
        return _show(parsed)
    if parsed.action == "validate":
        return _validate(parsed)
    return _import(parsed)


def _ls(parsed: argparse.Namespace) -> int:
    roles, questions = _load(parsed.sources)
    scenarios = load_scenarios(parsed.sources) if parsed.scenarios else []
    if parsed.scenarios:
        headings = ("id", "domain", "topic")
        rows = [(scenario.id, scenario.domain, scenario.topic) for scenario in scenarios]
    elif parsed.questions:
        headings = ("id", "category", "question")
        rows = [(q.id, q.category, q.text) for q in questions]
    elif parsed.traits:
        headings = ("id", "positive", "negative")
        poles = {role.id: role.description for role in roles if role.pole}
        names = dict.fromkeys(trait_of(role) for role in roles if role.pole)
        rows = [(name, poles[f"{name}.positive"], poles[f"{name}.negative"]) for name in names]
    else:
        headings = ("id", "kind", "description")
        rows = [(role.id, role.kind, role.description) for role in roles if not role.pole]
    if parsed.kind is not None:
        known = sorted({row[1] for row in rows})
        rows = [row for row in rows if row[1] == parsed.kind]
        if not rows:
            raise InputError(f"personas ls --kind: nothing of kind {parsed.kind!r}. There is: {', '.join(known)}.")
    table = Table(*headings, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    console.print(table)
    console.print(f"{len(rows)} of {_describe(parsed.sources, roles, questions, scenarios)}", highlight=False)
    return 0


def _show(parsed: argparse.Namespace) -> int:
    roles, questions = _load(parsed.sources)
    scenarios = load_scenarios([source for source in parsed.sources if holds_scenarios(source)])
    for number, name in enumerate(parsed.ids):
        found = [role for role in roles if name in (role.id, trait_of(role))]
        asked = [question for question in questions if question.id == name]
        held = [scenario for scenario in scenarios if scenario.id == name]
        if not found and not asked and not held:
            raise InputError(
                f"personas show: nothing is called {name!r}. `personaspace personas ls` lists what there is."
            )
        if number:
            print()
        for role in found:
            print(f"{role.id}  ({role.kind})\n  {role.description or 'no description'}")
            for prompt in role.prompts:
                print(f"  - {prompt}" if prompt else "  - (no system prompt)")
            if role.judge:
                print(f"  has instructions of its own for a judge: {len(role.judge)} characters")
        for question in asked:
            print(f"{question.id}  ({question.category})\n  {question.text}")
        for scenario in held:
            print(f"{scenario.id}  ({scenario.domain})\n  {scenario.topic}")
            print(f"  system: {scenario.system or '(no system prompt)'}\n  user: {scenario.user or 'not described'}")
            for turn in scenario.turns:
                print(f"  - {turn}")
    return 0


def _validate(parsed: argparse.Namespace) -> int:
    from personaspace.extract.catalogue_check import find_faults, most_alike

    roles, questions = _load(parsed.sources)
    scenarios = load_scenarios([source for source in parsed.sources if holds_scenarios(source)])
    faults = find_faults(roles, questions, scenarios)
    for fault in faults:
        print(fault)
    kinds = Counter(role.kind for role in roles if not role.pole)
    if kinds:
        print("roles: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    categories = Counter(question.category for question in questions)
    if categories:
        print("questions: " + ", ".join(f"{count} {category}" for category, count in categories.items()))
    domains = Counter(scenario.domain for scenario in scenarios)
    if domains:
        print("scenarios: " + ", ".join(f"{count} {domain}" for domain, count in domains.items()))
    for what, pair in most_alike(roles, questions, scenarios).items():
        both = pair.one if pair.one == pair.other else f"{pair.one} and {pair.other}"
        print(f"{what}: most alike are two of {both}, similarity {pair.similarity:.2f}")
    verdict = f"faults: {len(faults)}" if faults else "sound"
    print(f"{verdict}; {_describe(parsed.sources, roles, questions, scenarios)}")
    return 2 if faults else 0


def _import(parsed: argparse.Namespace) -> int:
    source = Path(parsed.source)
    file: Path = parsed.file
    if file.exists():
        raise InputError(f"personas import: {file} exists; give another name, or remove it.")
    if not source.is_dir() and source.suffix != ".jsonl":
        raise InputError(f"personas import: {source} is no folder and no JSONL file.")
    roles, questions = load_all(parsed.source)
    document: dict[str, Any] = {"version": 1}
    document["roles"] = [
        {"id": role.id, "description": role.description, "prompts": list(role.prompts), "judge": role.judge}
        for role in roles
        if not role.pole
    ]
    prompts = {(trait_of(role), role.pole): list(role.prompts) for role in roles if role.pole}
    judges = {trait_of(role): role.judge for role in roles if role.pole}
    document["traits"] = [
        {"id": name, **{pole: prompts[name, pole] for pole in POLES}, "judge": judge} for name, judge in judges.items()
    ]
    document["questions"] = [asdict(question) for question in questions]
    document = {key: value for key, value in document.items() if value}
    file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    print(f"{file}: {_describe([str(file)], roles, questions)}")
    return 0


def _load(sources: Sequence[str]) -> tuple[list[Role], list[Question]]:
    """Whatever roles, traits and questions the sources hold."""
    loaded = [load_all(source) for source in sources]
    return [role for roles, _ in loaded for role in roles], [asked for _, questions in loaded for asked in questions]


def _describe(
    sources: Sequence[str],
    roles: Sequence[Role],
    questions: Sequence[Question],
    scenarios: Sequence[Scenario] = (),
) -> str:
    poles = sum(bool(role.pole) for role in roles)
    hash_ = catalogue_hash({"roles": [asdict(role) for role in roles], "questions": [asdict(q) for q in questions]})
    names = ", ".join(f"{BUILTIN} (version {builtin_version()})" if name == BUILTIN else name for name in sources)
    parts = {"roles": len(roles) - poles, "traits": poles // 2, "questions": len(questions)}
    parts["scenarios"] = len(scenarios)
    counted = [f"{count} {what if count > 1 else what[:-1]}" for what, count in parts.items() if count]
    return f"{', '.join(counted)} in {names}, hash {hash_}"
