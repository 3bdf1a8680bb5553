"""Continuing a plan: what is stored never moves, what is new comes after it, and ids keep their meaning."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.catalogue import Question, Role
from personaspace.extract.growth import Change, StoredPlan, continue_plan
from personaspace.extract.personas import PersonaPlan, PlannedRollout, plan_imported, rollout_id
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.layout import Layout
from personaspace.store.plan import PlannedRow

ROLES = [Role(id=name, kind="everyday", description=f"A {name}.", prompts=()) for name in ("default", "ghost", "poet")]
PROMPTS = ("Be one.", "Act as one.", "")
QUESTIONS = [Question(id=f"q{number}", category="self", text=f"Question {number}?") for number in range(4)]


def catalogue(
    roles: Sequence[tuple[str, Sequence[str]]], questions: Sequence[Question], samples: int = 1
) -> PersonaPlan:
    """The plan of roles (id, prompts) crossed with questions, as ``plan_personas`` makes it."""
    chosen = tuple(replace(role, prompts=tuple(prompts)) for id_, prompts in roles for role in ROLES if role.id == id_)
    rows: list[PlannedRollout] = []
    for role_id, role in enumerate(chosen):
        for prompt, text in enumerate(role.prompts):
            for question, asked in enumerate(questions):
                for sample in range(samples):
                    system = ({"role": "system", "content": f"{role.id}: {text}"},)
                    messages = (*system, {"role": "user", "content": asked.text})
                    identity = rollout_id(role.id, messages, "T=0.7", sample)
                    rows.append(
                        PlannedRollout(
                            row=len(rows),
                            role_id=role_id,
                            prompt=prompt,
                            question=question,
                            sample=sample,
                            rollout_id=identity,
                            messages=messages,
                        )
                    )
    return PersonaPlan(roles=chosen, questions=tuple(questions), rows=tuple(rows))


def stored(plan: PersonaPlan) -> StoredPlan:
    """The plan as run.json and its Parquet files keep it: without conversations."""
    names = PlannedRow.__dataclass_fields__
    rows = tuple(PlannedRow(**{name: getattr(row, name) for name in names}) for row in plan.rows)
    return StoredPlan(roles=plan.roles, questions=plan.questions, rows=rows)


def layout_of(rows: int, unit_rows: int = 4) -> Layout:
    return Layout(segments=(rows,), layers=1, hidden=1, unit_rows=unit_rows, layer_group=1)


def grow(before: PersonaPlan, after: PersonaPlan, change: Change = "grow") -> PersonaPlan:
    return continue_plan(stored(before), after, layout_of(len(before.rows)), change=change, where="runs/demo")


BEFORE = catalogue([("default", PROMPTS[:1]), ("ghost", PROMPTS[:2])], QUESTIONS[:2])
"""Six rows: two units of four, the last with two rows of padding."""


def test_the_same_plan_goes_on_as_it_is() -> None:
    for change in ("refuse", "grow", "keep"):
        assert grow(BEFORE, BEFORE, change) == BEFORE


def test_a_reordered_catalogue_keeps_rows_and_indices() -> None:
    shuffled = catalogue([("ghost", PROMPTS[1::-1]), ("default", PROMPTS[:1])], QUESTIONS[1::-1])
    assert [row.rollout_id for row in shuffled.rows] != [row.rollout_id for row in BEFORE.rows]
    assert grow(BEFORE, shuffled, "refuse") == BEFORE


@pytest.mark.parametrize(
    ("after", "added"),
    [
        pytest.param(
            catalogue([*[("poet", PROMPTS[:1])], ("default", PROMPTS[:1]), ("ghost", PROMPTS[:2])], QUESTIONS[:2]),
            [(2, 0, 0, 0), (2, 0, 1, 0)],
            id="role",
        ),
        pytest.param(
            catalogue([("default", PROMPTS[:1]), ("ghost", (PROMPTS[2], *PROMPTS[:2]))], QUESTIONS[:2]),
            [(1, 2, 0, 0), (1, 2, 1, 0)],
            id="prompt",
        ),
        pytest.param(
            catalogue([("default", PROMPTS[:1]), ("ghost", PROMPTS[:2])], QUESTIONS[2::-1]),
            [(0, 0, 2, 0), (1, 0, 2, 0), (1, 1, 2, 0)],
            id="question",
        ),
        pytest.param(
            catalogue([("default", PROMPTS[:1]), ("ghost", PROMPTS[:2])], QUESTIONS[:2], samples=2),
            [(0, 0, 0, 1), (0, 0, 1, 1), (1, 0, 0, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 1)],
            id="sample",
        ),
    ],
)
def test_what_is_new_is_appended_at_the_next_unit(after: PersonaPlan, added: list[tuple[int, int, int, int]]) -> None:
    """Wherever it stands in the catalogue: added is (role, prompt, question, sample) in the run's own indices."""
    grown = grow(BEFORE, after)
    assert grown.rows[:6] == BEFORE.rows
    assert [(row.role_id, row.prompt, row.question, row.sample) for row in grown.rows[6:]] == added
    assert [row.row for row in grown.rows[6:]] == list(range(8, 8 + len(added)))
    assert all(row.messages for row in grown.rows)


def test_tables_grow_at_their_ends() -> None:
    after = catalogue([("poet", PROMPTS), ("ghost", (PROMPTS[2], PROMPTS[1]))], QUESTIONS[3:0:-1])
    grown = grow(BEFORE, after)
    assert [role.id for role in grown.roles] == ["default", "ghost", "poet"]
    assert [role.prompts for role in grown.roles] == [PROMPTS[:1], (PROMPTS[0], PROMPTS[1], PROMPTS[2]), PROMPTS]
    assert [question.id for question in grown.questions] == ["q0", "q1", "q3", "q2"]


def test_stored_rollouts_that_the_config_lacks_stay_without_their_conversation() -> None:
    grown = grow(BEFORE, catalogue([("default", PROMPTS[:1]), ("poet", PROMPTS[:1])], QUESTIONS[:2]))
    assert [row.rollout_id for row in grown.rows[:6]] == [row.rollout_id for row in BEFORE.rows]
    assert [bool(row.messages) for row in grown.rows] == [True] * 2 + [False] * 4 + [True] * 2


def test_keeping_adds_nothing_and_refuses_nothing() -> None:
    other = catalogue([("default", PROMPTS[:1]), ("poet", PROMPTS[:1])], QUESTIONS[1:3])
    kept = grow(BEFORE, other, "keep")
    assert (kept.roles, kept.questions) == (BEFORE.roles, BEFORE.questions)
    assert [replace(row, messages=()) for row in kept.rows] == [replace(row, messages=()) for row in BEFORE.rows]
    assert [bool(row.messages) for row in kept.rows] == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("after", "added", "absent"),
    [
        (catalogue([("default", PROMPTS[:1]), ("ghost", PROMPTS[:2])], QUESTIONS[:3]), 3, 0),
        (catalogue([("default", PROMPTS[:1]), ("ghost", PROMPTS[:1])], QUESTIONS[:2]), 0, 2),
        (catalogue([("default", PROMPTS[:1]), ("poet", PROMPTS[:2])], QUESTIONS[:2]), 4, 4),
    ],
)
def test_another_plan_is_refused_unless_the_run_may_grow(after: PersonaPlan, added: int, absent: int) -> None:
    message = (
        f"runs/demo: this run has 6 rollouts; the config plans {added} that it does not have, and lacks {absent} of "
        "its own. Add --store.grow to add the new ones (what is stored stays as it is), use the config that planned "
        "the run, or use another --store.run. Nothing was changed."
    )
    with pytest.raises(IdentityError, match=f"^{re.escape(message)}$") as error:
        grow(BEFORE, after, "refuse")
    assert error.value.exit_code == 2
    assert len(grow(BEFORE, after).rows) == 6 + added


def test_a_question_id_with_another_text_is_refused() -> None:
    changed = replace(QUESTIONS[1], text="Something else?")
    after = catalogue([("default", PROMPTS[:1]), ("ghost", PROMPTS[:2])], [QUESTIONS[0], changed])
    message = (
        "personas.questions: 'q1' is 'Something else?', and in this run 'Question 1?'. "
        "Ids are permanent: give the new text an id of its own."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        grow(BEFORE, after)


def test_what_people_wrote_about_a_role_is_kept() -> None:
    after = catalogue([("ghost", PROMPTS[:3]), ("default", PROMPTS[:1])], QUESTIONS[:2])
    renamed = replace(after, roles=(replace(after.roles[0], description="New", kind="abstract"), after.roles[1]))
    grown = grow(BEFORE, renamed)
    assert (grown.roles[1].description, grown.roles[1].kind) == ("A ghost.", "everyday")


@st.composite
def catalogues(draw: st.DrawFn) -> PersonaPlan:
    names = draw(st.permutations([role.id for role in ROLES]))[: draw(st.integers(1, 3))]
    roles = [(name, draw(st.permutations(PROMPTS))[: draw(st.integers(1, 3))]) for name in names]
    questions = draw(st.permutations(QUESTIONS))[: draw(st.integers(1, 4))]
    return catalogue(roles, questions, draw(st.integers(1, 2)))


@given(st.lists(catalogues(), min_size=2, max_size=4), st.integers(1, 7))
def test_rows_of_stored_rollouts_never_move(plans: list[PersonaPlan], unit_rows: int) -> None:
    run, layout = plans[0], layout_of(len(plans[0].rows), unit_rows)
    for planned in plans[1:]:
        grown = continue_plan(stored(run), planned, layout, change="grow", where="runs/demo")
        bare = [{**asdict(row), "messages": ()} for row in grown.rows]
        assert bare[: len(run.rows)] == [{**asdict(row), "messages": ()} for row in run.rows]
        new = grown.rows[len(run.rows) :]
        assert [row.row for row in new] == list(range(layout.padded_rows, layout.padded_rows + len(new)))
        ids = [row.rollout_id for row in grown.rows]
        assert len(set(ids)) == len(ids)
        assert set(ids) == {row.rollout_id for plan in (run, planned) for row in plan.rows}
        assert [role.id for role in grown.roles][: len(run.roles)] == [role.id for role in run.roles]
        assert grown.questions[: len(run.questions)] == run.questions
        for row in grown.rows:
            # Indices mean, in the grown tables, what the conversation says.
            role = grown.roles[row.role_id]
            system = {"role": "system", "content": f"{role.id}: {role.prompts[row.prompt]}"}
            messages = (system, {"role": "user", "content": grown.questions[row.question].text})
            assert rollout_id(role.id, messages, "T=0.7", row.sample) == row.rollout_id
            assert row.messages in ((), messages)
        if new:
            layout = layout.grow(len(new))
        assert [row.row for row in grown.rows] == list(layout.planned_rows())
        run = grown


def respond(folder: Path, role: str, prompts: int) -> None:
    """Finished responses of a model without system messages: prompts are told apart by their index alone."""
    lines = []
    for prompt in range(prompts):
        turns = [{"role": "user", "content": f"Act {prompt}. Who?"}, {"role": "assistant", "content": f"I, {role}."}]
        line = {"prompt_index": prompt, "question_index": 0, "question": "Who?", "label": "pos", "system_prompt": ""}
        lines.append(json.dumps({**line, "conversation": turns}))
    (folder / f"{role}.jsonl").write_text("\n".join(lines) + "\n")


def test_prompts_of_the_same_text_are_kept_apart(tmp_path: Path) -> None:
    for role in ("default", "ghost"):
        respond(tmp_path, role, prompts=2)
    before = plan_imported(tmp_path)
    assert [row.prompt for row in before.rows] == [0, 1, 0, 1]
    respond(tmp_path, "ghost", prompts=3)
    respond(tmp_path, "poet", prompts=2)
    grown = grow(before, plan_imported(tmp_path))
    assert [(grown.roles[row.role_id].id, row.prompt) for row in grown.rows] == [
        ("default", 0),
        ("default", 1),
        ("ghost", 0),
        ("ghost", 1),
        ("ghost", 2),
        ("poet", 0),
        ("poet", 1),
    ]
    assert [len(role.prompts) for role in grown.roles] == [2, 3, 2]
