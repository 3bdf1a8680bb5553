"""Continuing a plan: a config's rollouts meet those that a run already has, and the run may grow by the rest.

Rollouts are told apart by their permanent ids, so roles, prompts and questions may come in another order than when
the run was planned. What is stored keeps its row and its indices; what is new begins at the next unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from personaspace.extract.catalogue import Question, Role
from personaspace.extract.personas import PersonaPlan, PlannedRollout
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.layout import Layout
from personaspace.store.plan import PlannedRow


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPlan:
    """What a run says of its rollouts."""

    roles: tuple[Role, ...]
    questions: tuple[Question, ...]
    rows: tuple[PlannedRow, ...]


Change = Literal["refuse", "grow", "keep"]
"""What to do where a config plans other rollouts than a run has: refuse, add the new ones, or keep to the run's."""


def continue_plan(
    stored: StoredPlan, planned: PersonaPlan, layout: Layout, *, change: Change, where: str
) -> PersonaPlan:
    """The run's plan, its rows as stored, followed by the new rows of ``planned`` if the run may grow.

    Stored rollouts that ``planned`` lacks stay. Raises IdentityError where the two differ and that is refused, and
    InputError for an id that stands for something else now.
    """
    new_by_id = {row.rollout_id: row for row in planned.rows}
    stored_ids = {row.rollout_id for row in stored.rows}
    added = [row for row in planned.rows if row.rollout_id not in stored_ids]
    absent = len(stored_ids - new_by_id.keys())
    if (added or absent) and change == "refuse":
        raise IdentityError(
            f"{where}: this run has {len(stored.rows)} rollouts; the config plans {len(added)} that it does not have, "
            f"and lacks {absent} of its own. Add --store.grow to add the new ones (what is stored stays as it is), "
            "use the config that planned the run, or use another --store.run. Nothing was changed."
        )
    if change == "keep":
        kept = tuple(_kept(row, new_by_id.get(row.rollout_id)) for row in stored.rows)
        return PersonaPlan(roles=stored.roles, questions=stored.questions, rows=kept)
    roles, prompt_of = _merge_roles(stored.roles, planned.roles)
    questions = _merge_questions(stored.questions, planned.questions)
    role_number = {role.id: number for number, role in enumerate(roles)}
    question_number = {question.id: number for number, question in enumerate(questions)}
    stored_rows = [_kept(row, new_by_id.get(row.rollout_id)) for row in stored.rows]
    grown = [
        replace(
            row,
            row=layout.padded_rows + offset,
            role_id=role_number[planned.roles[row.role_id].id],
            prompt=prompt_of[planned.roles[row.role_id].id][row.prompt],
            question=question_number[planned.questions[row.question].id],
        )
        for offset, row in enumerate(added)
    ]
    return PersonaPlan(roles=roles, questions=questions, rows=(*stored_rows, *grown))


def _kept(row: PlannedRow, planned: PlannedRollout | None) -> PlannedRollout:
    """A stored row, with the conversation that the config still has for it."""
    return PlannedRollout(
        **asdict(row),
        messages=() if planned is None else planned.messages,
        response=None if planned is None else planned.response,
        script=None if planned is None else planned.script,
        origin={} if planned is None else planned.origin,
        plain_id=None if planned is None else planned.plain_id,
    )


def _merge_roles(
    stored: Sequence[Role], planned: Sequence[Role]
) -> tuple[tuple[Role, ...], Mapping[str, Mapping[int, int]]]:
    """Stored roles with new prompts and roles at their ends; and for each role, planned prompt -> merged prompt."""
    merged = {role.id: role for role in stored}
    prompt_of: dict[str, dict[int, int]] = {}
    for role in planned:
        known = merged.setdefault(role.id, role)
        prompts, prompt_of[role.id] = list(known.prompts), {}
        for number, prompt in enumerate(role.prompts):
            # Prompts may share their text (imported ones of models without a system role): the n-th meets the n-th.
            places = [place for place, other in enumerate(prompts) if other == prompt]
            occurrence = role.prompts[:number].count(prompt)
            if occurrence == len(places):
                places.append(len(prompts))
                prompts.append(prompt)
            prompt_of[role.id][number] = places[occurrence]
        merged[role.id] = replace(known, prompts=tuple(prompts))
    return tuple(merged.values()), prompt_of


def _merge_questions(stored: Sequence[Question], planned: Sequence[Question]) -> tuple[Question, ...]:
    merged = {question.id: question for question in stored}
    for question in planned:
        known = merged.setdefault(question.id, question)
        if known.text != question.text:
            raise InputError(
                f"personas.questions: {question.id!r} is {question.text!r}, and in this run {known.text!r}. "
                "Ids are permanent: give the new text an id of its own."
            )
    return tuple(merged.values())
