"""The plan: crossing, permanent rollout ids, and every refusal as the user reads it."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.config import PersonasConfig
from personaspace.extract.personas import (
    PersonaPlan,
    plan_personas,
    rollout_id,
)
from personaspace.store.errors import InputError


def role(name: str, *prompts: str) -> dict[str, Any]:
    return {"id": name, "kind": "everyday", "description": "A test.", "prompts": list(prompts or (f"Be {name}.",))}


def question(name: str) -> dict[str, str]:
    return {"id": name, "category": "self", "text": f"What is {name}?"}


def write(file: Path, **document: Any) -> str:
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(file)


@pytest.fixture
def config(tmp_path: Path) -> PersonasConfig:
    """default (3 prompts) and ghost (2), asked q0 to q2."""
    roles = [role("ghost", "Be a ghost.", "Haunt."), role("default", "", "You are {model_name}.", "Be yourself.")]
    return PersonasConfig(
        roles=(write(tmp_path / "roles.yaml", version=1, roles=roles),),
        questions=(write(tmp_path / "questions.yaml", version=1, questions=[question(f"q{i}") for i in range(3)]),),
    )


def plan(config: PersonasConfig, generation: str = "T=0.7") -> PersonaPlan:
    return plan_personas(config, model_name="Tiny", generation=generation)


def coordinates(plan: PersonaPlan) -> list[tuple[str, int, int, int]]:
    return [(plan.roles[row.role_id].id, row.prompt, row.question, row.sample) for row in plan.rows]


def test_cross_asks_every_prompt_every_question_role_after_role(config: PersonasConfig) -> None:
    crossed = plan(replace(config, samples=1, default_samples=2))
    assert coordinates(crossed) == [
        *[("default", prompt, question, sample) for prompt in range(3) for question in range(3) for sample in range(2)],
        *[("ghost", prompt, question, 0) for prompt in range(2) for question in range(3)],
    ]
    assert [row.row for row in crossed.rows] == list(range(24))
    assert crossed.rows_per_role() == [18, 6]


def test_cycle_asks_every_question_once_and_prompts_take_turns(config: PersonasConfig) -> None:
    cycled = coordinates(plan(replace(config, pairing="cycle", default_samples=2)))
    assert [key[1:] for key in cycled if key[0] == "ghost"] == [(0, 0, 0), (1, 1, 0), (0, 2, 0)]
    default = [key[1:] for key in cycled if key[0] == "default"]
    assert default == [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 1, 1), (2, 2, 0), (0, 2, 1)]


def test_messages_name_the_model_and_leave_out_an_empty_system_prompt(config: PersonasConfig) -> None:
    rows = plan(replace(config, max_questions=1)).rows
    user = {"role": "user", "content": "What is q0?"}
    assert rows[0].messages == (user,)
    assert rows[1].messages == ({"role": "system", "content": "You are Tiny."}, user)


def test_fewer_prompts_questions_and_roles(config: PersonasConfig) -> None:
    small = plan(replace(config, prompts=1, max_questions=2, only=("ghost",)))
    assert Counter(key[0] for key in coordinates(small)) == {"default": 2, "ghost": 2}


@given(st.randoms(use_true_random=False), st.integers(0, 3), st.integers(0, 2))
def test_rollout_ids_survive_new_and_reordered_questions_and_roles(
    tmp_path_factory: pytest.TempPathFactory, shuffler: random.Random, more_questions: int, more_roles: int
) -> None:
    folder = tmp_path_factory.mktemp("personas")
    questions = [question(f"q{i}") for i in range(3)]
    roles = [role("default", "", "Be yourself."), role("ghost")]

    def ids() -> dict[tuple[str, int, str, int], str]:
        made = plan(
            PersonasConfig(
                roles=(write(folder / "roles.yaml", roles=roles),),
                questions=(write(folder / "questions.yaml", questions=questions),),
                samples=2,
            )
        )
        return {
            (role, prompt, made.questions[question].id, sample): row.rollout_id
            for (role, prompt, question, sample), row in zip(coordinates(made), made.rows, strict=True)
        }

    before = ids()
    questions += [question(f"new{i}") for i in range(more_questions)]
    roles += [role(f"new{i}") for i in range(more_roles)]
    shuffler.shuffle(questions)
    shuffler.shuffle(roles)
    after = ids()
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after)


def test_rollout_id_depends_on_all_that_decides_a_rollout() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = {
        rollout_id("ghost", messages, "T=0.7", 0),
        rollout_id("poet", messages, "T=0.7", 0),
        rollout_id("ghost", [{"role": "system", "content": "Haunt."}, *messages], "T=0.7", 0),
        rollout_id("ghost", messages, "T=0.8", 0),
        rollout_id("ghost", messages, "T=0.7", 1),
    }
    assert len(ids) == 5
    assert all(len(i) == 16 for i in ids)


def test_rollout_ids_follow_rows_and_generation(config: PersonasConfig) -> None:
    """By them a run knows whether a config still plans the same."""

    def ids(made: PersonaPlan) -> list[str]:
        return [row.rollout_id for row in made.rows]

    assert plan(config) == plan(config)
    assert len(set(ids(plan(config)))) == len(plan(config).rows)
    assert not set(ids(plan(config))) & set(ids(plan(config, "T=0.8")))
    assert set(ids(plan(replace(config, max_questions=2)))) < set(ids(plan(config)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": ("ghots",)}, "personas.only: 'ghots' is unknown. Did you mean ghost? `personaspace personas ls`"),
        ({"only": ("default",)}, "personas: `default` alone spans no space; use at least one more role."),
        ({"roles": ("no.yaml",)}, "personas.roles: no.yaml does not exist; give `builtin`, a YAML file, a folder"),
        ({"questions": ("no.yaml",)}, "personas.questions: no.yaml does not exist; give `builtin`, a YAML file, a"),
        ({"traits": ("no.yaml",)}, "personas.traits: no.yaml does not exist; give `builtin`, a YAML file, a folder"),
    ],
)
def test_refused_settings(config: PersonasConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        plan(replace(config, **change))
    assert str(error.value).startswith(message)


def test_a_plan_needs_default_and_questions(tmp_path: Path, config: PersonasConfig) -> None:
    lonely = write(tmp_path / "lonely.yaml", roles=[role("ghost")])
    with pytest.raises(InputError, match=r"personas\.roles: no role `default`; the axis is measured against it"):
        plan(replace(config, roles=(lonely,)))
    empty = write(tmp_path / "empty.yaml", questions=[])
    with pytest.raises(InputError, match=r"personas\.questions: no questions in .*empty\.yaml; give at least one"):
        plan(replace(config, questions=(empty,)))


def test_traits_are_asked_as_roles_are(tmp_path: Path, config: PersonasConfig) -> None:
    calm, odd = ({"id": name, "positive": f"stay {name}", "negative": f"lose {name}"} for name in ("calm", "odd"))
    frames = ["You {behaviour}.", "Always {behaviour}."]
    file = write(tmp_path / "traits.yaml", frames=frames, traits=[calm, odd])
    both = plan(replace(config, traits=(file,), max_questions=1))
    assert [role.id for role in both.roles][2:] == ["calm.positive", "calm.negative", "odd.positive", "odd.negative"]
    assert both.rows_per_role() == [3, 2, 2, 2, 2, 2]
    assert both.rows[-1].messages[0] == {"role": "system", "content": "Always lose odd."}
    assert [row.rollout_id for row in both.rows[:5]] == [
        row.rollout_id for row in plan(replace(config, max_questions=1)).rows
    ]
    one = plan(replace(config, traits=(file,), only_traits=("odd",)))
    assert [role.id for role in one.roles][2:] == ["odd.positive", "odd.negative"]


def test_refuses_rows_that_say_the_same(tmp_path: Path, config: PersonasConfig) -> None:
    """Two prompts (or questions) with one text would give two rows with one rollout id, and one seed."""
    file = write(tmp_path / "same.yaml", roles=[role("default"), role("ghost", "Haunt.", "Haunt.")])
    with pytest.raises(InputError, match="more than once"):
        plan(replace(config, roles=(file,)))


def test_reads_assistant_axis_files(tmp_path: Path) -> None:
    for name in ("ghost", "default"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"instruction": [{"pos": f"Be {name}."}, {"pos": ""}]}))
    (tmp_path / "questions.jsonl").write_text('{"question": "Who?", "id": 7}\n{"question": "Why?", "id": 9}\n')
    made = plan(PersonasConfig(roles=(str(tmp_path),), questions=(str(tmp_path / "questions.jsonl"),)))
    assert [role.id for role in made.roles] == ["default", "ghost"]
    assert [question.id for question in made.questions] == ["aa7", "aa9"]
    assert len(made.rows) == 8
