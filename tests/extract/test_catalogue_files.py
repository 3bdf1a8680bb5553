"""Catalogue files: a team's own YAML, the reference project's folders, and every refusal as the user reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.extract.catalogue import Question, Role
from personaspace.extract.catalogue_files import load_all, load_questions, load_roles, load_traits
from personaspace.store.errors import InputError

KEEPER = {"id": "keeper", "prompts": ["You keep the light."]}
NEEDS = "it needs ['id', 'prompts'], and may have ['description', 'judge', 'kind']."


def write(file: Path, **document: Any) -> str:
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(file)


def test_one_entry_adds_a_role_to_the_built_in_ones(tmp_path: Path) -> None:
    roles = load_roles(["builtin", write(tmp_path / "ours.yaml", roles=[KEEPER])])
    assert len(roles) == 277
    assert (roles[0].id, roles[-1]) == (
        "default",
        Role(id="keeper", kind="unknown", description="", prompts=("You keep the light.",)),
    )


def test_a_folder_of_files_is_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", roles=[KEEPER], questions=[{"id": "x1", "text": "Who?"}])
    write(tmp_path / "a.yaml", roles=[{**KEEPER, "id": "miller", "kind": "everyday"}])
    assert [role.id for role in load_roles([str(tmp_path)])] == ["miller", "keeper"]
    assert load_questions([str(tmp_path)]) == [Question(id="x1", category="unknown", text="Who?")]
    assert [role.id for role in load_all(str(tmp_path))[0]] == ["miller", "keeper"]


def test_the_reference_projects_files_are_read_as_they_are(tmp_path: Path) -> None:
    roles, traits = tmp_path / "roles", tmp_path / "traits"
    roles.mkdir()
    traits.mkdir()
    judge = "Rate {answer} to {question}."
    (roles / "ghost.json").write_text(json.dumps({"instruction": [{"pos": "Haunt."}], "eval_prompt": judge}))
    (roles / "default.json").write_text(json.dumps({"instruction": [{"pos": ""}, {"pos": "You are {model_name}."}]}))
    (traits / "calm.json").write_text(json.dumps({"instruction": [{"pos": "Be calm.", "neg": "Panic."}]}))
    default, ghost = load_roles([str(roles)])
    assert (default.prompts, ghost.judge) == (("", "You are {model_name}."), judge)
    assert [(pole.id, pole.pole, pole.prompts) for pole in load_traits([str(traits)])] == [
        ("calm.positive", "positive", ("Be calm.",)),
        ("calm.negative", "negative", ("Panic.",)),
    ]
    assert load_all(str(roles)) == ([default, ghost], [])
    assert load_all(str(traits)) == (load_traits([str(traits)]), [])
    with pytest.raises(InputError, match=r"default\.json: a trait needs a text under `neg`"):
        load_traits([str(roles)])
    with pytest.raises(InputError, match=r"calm\.json: is a trait, with texts under `neg`; give its folder in"):
        load_roles([str(traits)])


def test_a_trait_may_have_prompts_of_its_own(tmp_path: Path) -> None:
    entry = {"id": "calm", "positive": ["Be calm.", "Breathe."], "negative": ["Panic.", "Shout."], "judge": "Calm?"}
    positive, negative = load_traits([write(tmp_path / "traits.yaml", traits=[entry])])
    assert (positive.prompts, negative.prompts) == (("Be calm.", "Breathe."), ("Panic.", "Shout."))
    assert (positive.description, positive.judge) == ("", "Calm?")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"roles": [KEEPER, KEEPER]},
            "personas.roles: id keeper appears more than once, in FILE; each must be unique.",
        ),
        ({"personas": []}, "personas.roles: FILE has no list under `roles:`."),
        ({"roles": {"keeper": []}}, "FILE: `roles` is {'keeper': []}; expected a list."),
        ({"roles": [{"id": "keeper"}]}, f"FILE: roles[0] has ['id']; {NEEDS}"),
        ({"roles": [{**KEEPER, "promts": []}]}, f"FILE: roles[0] has ['id', 'prompts', 'promts']; {NEEDS}"),
        ({"roles": ["keeper"]}, "FILE: roles[0] is 'keeper'; expected a mapping with an `id`."),
        ({"roles": [{**KEEPER, "id": 7}]}, "FILE: roles[0].id is 7; expected a text."),
        ({"roles": [{**KEEPER, "id": "light keeper"}]}, "FILE: roles[0]: role name 'light keeper' can't be a file"),
        ({"roles": [{**KEEPER, "prompts": []}]}, "FILE: roles[0].prompts is []; give a list of at least one text."),
        ({"roles": [{**KEEPER, "prompts": [1]}]}, "FILE: roles[0].prompts is [1]; give a list of at least one text."),
        (
            {"roles": [{**KEEPER, "prompts": ["Shine.", "Shine."]}]},
            "FILE: roles[0]: 'keeper': prompt 'Shine.' appears more than once; each must be unique.",
        ),
    ],
)
def test_refused_roles(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "bad.yaml", **document)
    with pytest.raises(InputError) as error:
        load_roles([file])
    assert str(error.value).startswith(message.replace("FILE", file))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"traits": [{"id": "calm", "positive": "be calm"}]}, "FILE: traits[0] has ['id', 'positive']; it needs"),
        ({"traits": [{"id": "calm", "positive": "be calm", "negative": 1}]}, "FILE: traits[0].negative is 1; expected"),
        (
            {"frames": ["Be nice."], "traits": [{"id": "calm", "positive": "be calm", "negative": "panic"}]},
            "FILE: traits[0]: frames is ['Be nice.']; give a list of texts that hold {behaviour}.",
        ),
    ],
)
def test_refused_traits(tmp_path: Path, document: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "bad.yaml", **document)
    with pytest.raises(InputError) as error:
        load_traits([file])
    assert str(error.value).startswith(message.replace("FILE", file))


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([{"id": "q0", "text": "Who?"}] * 2, "personas.questions: id q0 appears more than once, in FILE;"),
        ([{"id": f"q{i}", "text": "Who?"} for i in range(2)], "personas.questions: question 'Who?' appears more than"),
        ([{"id": "q0"}], "FILE: questions[0] has ['id']; it needs ['id', 'text'], and may have ['category']."),
        ([{"id": "q0", "text": None}], "FILE: questions[0].text is None; expected a text."),
    ],
)
def test_refused_questions(tmp_path: Path, questions: list[Any], message: str) -> None:
    file = write(tmp_path / "bad.yaml", questions=questions)
    with pytest.raises(InputError) as error:
        load_questions([file])
    assert str(error.value).startswith(message.replace("FILE", file))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"roles: [", "not valid YAML"), (b"roles: \xff\n", "not UTF-8 text"), (b"- ghost\n", r"holds \['ghost'\]")],
)
def test_refused_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    for load in (load_roles, load_traits, load_questions):
        with pytest.raises(InputError, match=rf"bad\.yaml: {message}"):
            load([str(file)])


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.yaml does not exist; give `builtin`, a file or a folder"):
        load_all(str(tmp_path / "no.yaml"))
    with pytest.raises(InputError, match=r"holds no lists under `roles:`, `traits:` or `questions:`"):
        load_all(write(tmp_path / "empty.yaml", version=1))
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"holds no ROLE\.json files"):
        load_roles([str(tmp_path / "bare")])
