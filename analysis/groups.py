"""Which rollouts speak for which role: groups by role and score (arXiv 2601.10387, section 2: role vectors).

A judge's 3 means that the response plays the role fully, 2 somewhat; the two make two vectors, kept apart, and only the
full ones decide where the Assistant Axis points. `default` plays no role, and is never filtered. Shape suffixes: N
rows of the rollout axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from personaspace.analysis.cells import NO_CELL
from personaspace.store.errors import InputError
from personaspace.store.formats.role_names import DEFAULT_ROLE, SCENARIO

Level = Literal["all", "fully", "somewhat"]
Part = Literal["default", "roles", "traits"]
PARTS: tuple[Part, ...] = ("default", "roles", "traits")
"""What the rollouts of a run are told apart by; conversations are in none of them."""
LEVEL_OF_SCORE: Mapping[int, Level] = {3: "fully", 2: "somewhat"}
MOST_NEEDED = 50
"""The reference project's least number of rollouts of a role vector, for 1,200 rollouts of each role."""
NEEDED_SHARE = 24
"""A smaller run needs one rollout of each 24 that it has of a role: 50 of 1,200."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rollouts that make one vector."""

    role_id: int
    """Place in the run's table of roles."""
    level: Level
    """`all`: no scores; `fully` (3) or `somewhat` (2)."""
    count: int
    """Rollouts in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """How the rollouts of a run are grouped."""

    default: Group
    roles: tuple[Group, ...]
    """`fully` or `all` first, then `somewhat`."""
    traits: tuple[tuple[str, Group, Group], ...]
    """Trait id, and its positive and negative pole."""
    filter: str
    """For people: by which scores, or why by none."""
    too_few: tuple[str, ...]
    """Groups that were left out since they have fewer rollouts than ``needed``."""
    needed: int
    questions: int
    """Q: cells of each group but the poles, which have one."""

    @property
    def core(self) -> NDArray[np.intp]:
        """Places among ``roles`` of those that the axis rests on."""
        return np.array([n for n, group in enumerate(self.roles) if group.level != "somewhat"], dtype=np.intp)

    @property
    def vector_cells(self) -> int:
        """Cells of `default` and the roles, which come first."""
        return (1 + len(self.roles)) * self.questions

    @property
    def cells(self) -> int:
        return self.vector_cells + 2 * len(self.traits)

    def cell_of_row(
        self, role_N: NDArray[np.integer], question_N: NDArray[np.integer], score_N: NDArray[np.floating] | None
    ) -> NDArray[np.intp]:
        """The cell of each rollout, by role id, question and score: `default` first, then the roles, then the poles."""
        cell_N = np.full(len(role_N), NO_CELL, dtype=np.intp)
        for place, group in enumerate((self.default, *self.roles)):
            members = np.flatnonzero(_members(group, role_N, score_N))
            cell_N[members] = place * self.questions + question_N[members]
        first = self.vector_cells
        poles = [pole for _, *pair in self.traits for pole in pair]
        for place, group in enumerate(poles):
            cell_N[_members(group, role_N, score_N)] = first + place
        return cell_N


def group_rollouts(
    roles: Sequence[Mapping[str, Any]],
    questions: int,
    role_N: NDArray[np.integer],
    score_N: NDArray[np.floating] | None,
    *,
    needed: int | None,
    where: str,
    judge: str = "",
) -> Groups:
    """Group the rollouts of the run at ``where`` by their role ids.

    ``score_N``: the judge's scores, NaN for rollouts without one, or None for no filter. ``needed``: rollouts that a
    group must have; default: see MOST_NEEDED. Raises InputError where `default` or all but one role have too few.
    """
    count_R = np.bincount(role_N, minlength=len(roles))
    is_role = np.array([part_of(role) == "roles" for role in roles])
    if needed is None:
        typical = float(np.median(count_R[is_role & (count_R > 0)])) if (is_role & (count_R > 0)).any() else 0
        needed = int(max(1, min(MOST_NEEDED, typical // NEEDED_SHARE)))
    levels: tuple[Level, ...] = ("all",) if score_N is None else tuple(LEVEL_OF_SCORE.values())
    found, too_few = [], []
    for level in levels:
        for role_id in np.flatnonzero(is_role & (count_R > 0)).tolist():
            group = _count(Group(role_id=role_id, level=level, count=0), role_N, score_N)
            if group.count >= needed:
                found.append(group)
            elif group.count:
                too_few.append(group_name(roles[role_id]["id"], level))
    default_ids = [number for number, role in enumerate(roles) if role["id"] == DEFAULT_ROLE and count_R[number]]
    core = sum(group.level != "somewhat" for group in found)
    if not default_ids or core < 2:
        raise InputError(f"{where}: {_too_little(len(default_ids), core, needed, judge, bool(too_few))}")
    default = _count(Group(role_id=default_ids[0], level="all", count=0), role_N, score_N)
    return Groups(
        default=default,
        roles=tuple(found),
        traits=_traits(roles, role_N, score_N, needed),
        filter=f"scores of {judge}: 3 is fully, 2 somewhat" if judge else "none: nobody judged the rollouts",
        too_few=tuple(too_few),
        needed=needed,
        questions=questions,
    )


def group_name(role: str, level: Level) -> str:
    """What a group's vector is called."""
    return f"{role} (somewhat)" if level == "somewhat" else role


def pooled(roles: Sequence[Mapping[str, Any]], role_N: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which rollouts the PCA over all rollouts takes: those of `default` and of every role, whatever their score."""
    counts = np.array([part_of(role) in ("default", "roles") for role in roles])
    pooled_N: NDArray[np.bool_] = counts[role_N]
    return pooled_N


def part_of(role: Mapping[str, Any]) -> Part | None:
    """What a row of the run's table of roles is: the poles of traits are no roles, and conversations no part at all."""
    if role["id"] == DEFAULT_ROLE:
        return "default"
    if role.get("kind") == SCENARIO:
        return None
    return "traits" if role.get("pole") else "roles"


def _members(group: Group, role_N: NDArray[np.integer], score_N: NDArray[np.floating] | None) -> NDArray[np.bool_]:
    of_role_N: NDArray[np.bool_] = role_N == group.role_id
    if score_N is None or group.level == "all":
        return of_role_N
    [wanted] = [score for score, level in LEVEL_OF_SCORE.items() if level == group.level]
    members_N: NDArray[np.bool_] = of_role_N & (np.rint(score_N) == wanted)
    return members_N


def _count(group: Group, role_N: NDArray[np.integer], score_N: NDArray[np.floating] | None) -> Group:
    count = int(_members(group, role_N, score_N).sum())
    return Group(role_id=group.role_id, level=group.level, count=count)


def _traits(
    roles: Sequence[Mapping[str, Any]],
    role_N: NDArray[np.integer],
    score_N: NDArray[np.floating] | None,
    needed: int,
) -> tuple[tuple[str, Group, Group], ...]:
    """Traits of which both poles have enough rollouts. Where there are scores, only fully played ones count."""
    poles: dict[str, dict[str, Group]] = {}
    level: Level = "all" if score_N is None else "fully"
    for role_id, role in enumerate(roles):
        if role.get("pole"):
            trait = role["id"].removesuffix(f".{role['pole']}")
            group = _count(Group(role_id=role_id, level=level, count=0), role_N, score_N)
            if group.count >= needed:
                poles.setdefault(trait, {})[role["pole"]] = group
    return tuple(
        (trait, pair["positive"], pair["negative"])
        for trait, pair in poles.items()
        if {"positive", "negative"} <= pair.keys()
    )


def _too_little(default: int, core: int, needed: int, judge: str, dropped: bool) -> str:
    message = (
        f"{default} of `default` and {core} other roles have usable rollouts; the axis needs `default` and at least "
        "two roles. "
    )
    if judge:
        return (
            f"{message}Only rollouts that {judge} scored 3 count, and a role needs {needed} of them. Let the judge go "
            "on, or lower --analysis.min-count, or take every rollout with --analysis.unfiltered."
        )
    if dropped:
        return f"{message}A role needs {needed} rollouts; lower --analysis.min-count."
    return f"{message}Let extraction go on, then fit again."
