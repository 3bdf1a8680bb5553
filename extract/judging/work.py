"""Which rollouts of a run are judged, and what is asked about each."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from personaspace.extract.catalogue import Role
from personaspace.extract.catalogue_files import BUILTIN, load_roles, load_traits
from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.instructions import Instructions, Prompt
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE, SCENARIO
from personaspace.store.manifest import Manifest
from personaspace.store.objects import Folder
from personaspace.store.plan import PlannedRow, read_plan
from personaspace.store.records import ROLLOUTS, read_records
from personaspace.store.rollouts import read_rollouts

COLUMNS = ["row", "role_id", "messages", "response", "response_token_ids"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One rollout to judge."""

    row: int
    prompt: Prompt
    response_tokens: int
    """As the run's own tokenizer counted them; 0 where it did not."""
    response_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a judge has to score in a run."""

    units: Mapping[int, tuple[int, ...]]
    """Unit -> its rows, in the order of work."""
    waiting: int
    """Rollouts that are to be judged and aren't generated yet."""

    @property
    def rows(self) -> int:
        return sum(map(len, self.units.values()))


def stored_roles(manifest: Manifest) -> list[Role]:
    """The roles of a run. One without description and instructions takes the built-in catalogue's, if that has it."""
    tables: list[Any] = list(manifest.tables["roles"])
    roles = [Role(**{**table, "prompts": tuple(table["prompts"])}) for table in tables]
    if all(role.description or role.judge for role in roles):
        return roles
    known = {role.id: role for role in (*load_roles([BUILTIN]), *load_traits([BUILTIN]))}
    return [
        role
        if role.description or role.judge or role.id not in known
        else replace(role, description=known[role.id].description)
        for role in roles
    ]


def assign(folder: Folder, manifest: Manifest, config: JudgeConfig, *, everyone: bool = False) -> Assignment:
    """The rollouts that a config wants judged and that are there and usable.

    Only with ``everyone`` (for judges of categories) those of `default` and conversations, which play no role. Raises
    InputError for roles that the run does not have.
    """
    table = manifest.tables["roles"]
    names = [role["id"] for role in table]
    played = [role["id"] for role in table if everyone or (role["id"] != DEFAULT_ROLE and role.get("kind") != SCENARIO)]
    unknown = [role for role in config.roles if role not in played]
    if unknown:
        raise InputError(f"judge.roles: the run has no role {unknown[0]!r}. It has {', '.join(map(str, played[:20]))}.")
    wanted_roles = set(config.roles or played)
    records = read_records(folder, ROLLOUTS)
    dropped = {row for record in records.values() for row in record.dropped}
    there = {unit for _, unit, _ in records}
    wanted = [row for row in read_plan(folder, manifest) if names[row.role_id] in wanted_roles]
    if config.sample is not None:
        wanted = spread(wanted, config.sample)
    unit_rows = manifest.layout.unit_rows
    units: dict[int, list[int]] = {unit: [] for unit in manifest.unit_order if unit in there}
    for row in sorted(row.row for row in wanted):
        if row // unit_rows in units and row not in dropped:
            units[row // unit_rows].append(row)
    return Assignment(
        units={unit: tuple(rows) for unit, rows in units.items() if rows},
        waiting=sum(row.row // unit_rows not in there for row in wanted),
    )


def spread(rows: Iterable[PlannedRow], count: int) -> list[PlannedRow]:
    """So many rows, taken from the roles in turn; which of a role's is decided by their permanent ids alone."""
    by_role: dict[int, list[PlannedRow]] = {}
    for row in rows:
        by_role.setdefault(row.role_id, []).append(row)
    for of_role in by_role.values():
        of_role.sort(key=lambda row: hashlib.sha256(row.rollout_id.encode()).digest())
    turns = chain.from_iterable(zip_longest(*by_role.values()))
    return [row for row in turns if row is not None][:count]


def load_tasks(
    folder: Folder, unit: int, rows: Sequence[int], roles: Sequence[Role], instructions: Instructions
) -> Iterator[Task]:
    """What is asked about some rows of a unit."""
    wanted = set(rows)
    for entry in read_rollouts(folder, [unit], COLUMNS).to_pylist():
        if entry["row"] in wanted:
            yield Task(
                row=entry["row"],
                prompt=instructions.prompt(roles[entry["role_id"]], entry["messages"], entry["response"]),
                response_tokens=len(entry["response_token_ids"]),
                response_bytes=len(entry["response"].encode()),
            )
