"""Roles, traits and questions: the entries of a catalogue.

Ids are permanent: what an id stands for never changes. How to write entries: docs/personas.md.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE

KINDS = {
    "assistant": "the model as itself: the baseline, not a role",
    "professional": "a person doing skilled, usually paid work",
    "everyday": "a person described by age, family, situation or way of life",
    "outlook": "a person described by what they believe or how they are minded",
    "dramatic": "a person larger than life, as met in stories",
    "fantastical": "a creature of myth, religion or folklore",
    "artificial": "a made being or machine",
    "living": "an animal, plant or other living thing",
    "collective": "many that think and speak as one",
    "abstract": "a thing, force or idea that is no person at all",
}
"""What sort of being a role is. Fixed before any model is run, and not changed to fit a result."""
TRAIT = "trait"
"""Kind of the poles of a trait."""
POLES = ("positive", "negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """A persona that the model is asked to take on, or one pole of a trait."""

    id: str
    """Permanent name, such as `ghost`; of a pole `calm.positive`."""
    kind: str
    """One of KINDS, `trait`, or what a team's own catalogue says; `unknown` where nothing does."""
    description: str
    """One or two sentences; of a pole, how it answers."""
    prompts: tuple[str, ...]
    """System prompts; an empty one means no system message. `{model_name}` is substituted."""
    pole: str = ""
    """`positive` or `negative` for one of a trait."""
    judge: str = ""
    """Instructions of its own for a judge, with `{question}` and `{answer}`; empty: the project's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Something that every role is asked."""

    id: str
    """Permanent name, such as `q017`."""
    category: str
    """What it is about; `unknown` where nothing says it."""
    text: str


def select(roles: Sequence[Role], only: Sequence[str], where: str) -> list[Role]:
    """The roles named by ``only``, or the poles of the traits that it names, and `default`; all if it is empty.

    Raises InputError for unknown names.
    """
    names = {role.id: trait_of(role) or role.id for role in roles}
    for name in only:
        if name not in names.values():
            close = difflib.get_close_matches(name, set(names.values()), 3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "There is nothing like it."
            raise InputError(
                f"{where}: {name!r} is unknown. {hint} `personaspace personas ls` lists the built-in ones."
            )
    return [role for role in roles if not only or names[role.id] in only or role.id == DEFAULT_ROLE]


def trait_of(role: Role) -> str:
    """The trait of which a role is a pole; empty for others."""
    return role.id.removesuffix(f".{role.pole}") if role.pole else ""
