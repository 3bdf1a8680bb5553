"""The built-in catalogue as a whole, and what its own check finds in it and in damaged ones."""

import re
from collections import Counter
from dataclasses import asdict, replace

import pytest

from personaspace.extract.catalogue import KINDS, POLES, Question, Role, select, trait_of
from personaspace.extract.catalogue_check import find_faults, most_alike
from personaspace.extract.catalogue_files import builtin_version, load_questions, load_roles, load_traits
from personaspace.store.errors import InputError
from personaspace.store.manifest import catalogue_hash

WRITTEN = {2: "687a99a604b519d3"}
"""Version of the built-in catalogue -> hash of its texts. A change of any text needs a new version."""
TELLTALE = re.compile(r"role-?play|pretend|language model", re.IGNORECASE)


@pytest.fixture(scope="module")
def roles() -> list[Role]:
    return load_roles(["builtin"])


@pytest.fixture(scope="module")
def poles() -> list[Role]:
    return load_traits(["builtin"])


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return load_questions(["builtin"])


def test_its_size_and_shape(roles: list[Role], poles: list[Role], questions: list[Question]) -> None:
    default, *others = roles
    assert (default.id, default.kind, default.prompts[0]) == ("default", "assistant", "")
    assert (len(others), len(poles), len(questions)) == (275, 480, 240)
    assert {role.kind for role in roles} == set(KINDS)
    assert {len(role.prompts) for role in (*roles, *poles)} == {5}
    assert [role.pole for role in poles] == list(POLES) * 240


def test_every_text_is_its_own(roles: list[Role], poles: list[Role], questions: list[Question]) -> None:
    assert find_faults([*roles, *poles], questions) == []
    prompts = [prompt for role in (*roles, *poles) for prompt in role.prompts]
    assert len(set(prompts)) == len(prompts)
    nearest = most_alike([*roles, *poles], questions)
    assert {what: pair.similarity < 0.35 for what, pair in nearest.items()} == dict.fromkeys(nearest, True)


def test_prompts_are_those_of_their_role(roles: list[Role]) -> None:
    for role in roles[1:]:
        words = [len(prompt.split()) for prompt in role.prompts]
        assert 12 <= min(words) <= max(words) <= 40, role.id
        assert len({" ".join(prompt.split()[:2]) for prompt in role.prompts}) == 5, f"{role.id}: openings"
        assert all(prompt.isascii() for prompt in role.prompts), role.id
        if role.kind != "artificial":
            assert not any(TELLTALE.search(prompt) for prompt in role.prompts), role.id


def test_frames_say_what_the_trait_says(poles: list[Role]) -> None:
    calm = next(role for role in poles if role.id == "calm.negative")
    assert (trait_of(calm), calm.kind, calm.pole) == ("calm", "trait", "negative")
    assert all(calm.description in prompt for prompt in calm.prompts)


def test_questions_stay_balanced_in_every_block_of_eight(questions: list[Question]) -> None:
    first = [question.category for question in questions[:8]]
    assert len(set(first)) == 8
    assert [question.category for question in questions] == first * 30
    assert [question.id for question in questions] == [f"q{number:03d}" for number in range(1, 241)]


def test_a_changed_text_needs_a_new_version(roles: list[Role], poles: list[Role], questions: list[Question]) -> None:
    tables = {"roles": [asdict(role) for role in (*roles, *poles)], "questions": [asdict(q) for q in questions]}
    assert WRITTEN[builtin_version()] == catalogue_hash(tables)
    assert catalogue_hash({key: table[::-1] for key, table in tables.items()}) == catalogue_hash(tables)
    tables["questions"][7] = {**tables["questions"][7], "text": "Another?"}
    assert WRITTEN[builtin_version()] != catalogue_hash(tables)


def test_what_is_wrong_is_said(roles: list[Role], questions: list[Question]) -> None:
    ghost, poet = (next(role for role in roles if role.id == name) for name in ("ghost", "poet"))
    damaged = [
        replace(ghost, description="", prompts=(*ghost.prompts[:3], " ", "You are {name}.")),
        replace(poet, prompts=(poet.prompts[0], poet.prompts[0] + " Always.", poet.prompts[2]), judge="Rate {answer}."),
    ]
    asked = [questions[0], Question(id="q999", category="self", text="Who are you, {role}?")]
    found = find_faults(damaged, asked)
    assert found[:-1] == [
        "role ghost: has no description, which a judge goes by.",
        "role ghost: prompt 3 is empty, so the model would answer as itself.",
        "role ghost: prompt 3 begins or ends with blanks.",
        "role ghost: prompt 4 has {name}, but only {model_name} is substituted.",
        "role poet: the judge's instructions need {question} and {answer}.",
        "roles: have 3 to 5 prompts (poet the fewest), and so unequal numbers of rollouts.",
        "question q999: has {role}, which nothing substitutes.",
    ]
    assert re.fullmatch(r"prompts: two of poet are nearly the same \(similarity 0\.9\d\)\.", found[-1])


def test_chosen_by_name(roles: list[Role], poles: list[Role]) -> None:
    assert [role.id for role in select(roles, ["ghost"], "personas.only")] == ["default", "ghost"]
    assert [role.id for role in select(poles, ["calm"], "personas.only_traits")] == ["calm.positive", "calm.negative"]
    assert select(roles, [], "personas.only") == roles
    with pytest.raises(InputError, match=r"personas\.only: 'ghots' is unknown\. Did you mean ghost"):
        select(roles, ["ghots"], "personas.only")
    with pytest.raises(InputError, match=r"personas\.only: 'zzz' is unknown\. There is nothing like it\."):
        select(roles, ["zzz"], "personas.only")


def test_kinds_are_all_in_use(roles: list[Role]) -> None:
    assert all(count > 1 for kind, count in Counter(role.kind for role in roles).items() if kind != "assistant")
