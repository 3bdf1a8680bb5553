import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from personaspace.extract.catalogue import Role
from personaspace.extract.judging.instructions import TEXTS, Scale, load_instructions
from personaspace.store.errors import InputError

ROLES = Path("/work/shared/reference/assistant-axis/roles")
QUESTION = [{"role": "system", "content": "You are a ghost."}, {"role": "user", "content": "Why {answer}?"}]


def role(**changes: str) -> Role:
    return Role(**{"id": "old_ghost", "kind": "fantastical", "description": "A ghost.", "prompts": ("",), **changes})


def test_a_role_is_judged_by_its_description_and_the_system_prompt_is_not_shown() -> None:
    prompt = load_instructions("builtin").prompt(role(), QUESTION, "Boo {question}")
    system, user = (message["content"] for message in prompt.messages)
    assert [message["role"] for message in prompt.messages] == ["system", "user"]
    assert "this role: old ghost.\nA ghost.\n" in user
    assert "=== question ===\nWhy {answer}?\n=== answer ===\nBoo {question}\n=== end ===" in user
    assert "You are a ghost" not in system + user
    assert prompt.scale == Scale()


def test_a_pole_is_judged_by_how_it_answers() -> None:
    pole = role(id="calm.negative", pole="negative", description="fret over every word")
    prompt = load_instructions("builtin").prompt(pole, QUESTION, "Oh no")
    assert "Someone who has this manner would fret over every word.\n" in prompt.messages[1]["content"]
    assert prompt.scale == Scale()


def test_instructions_of_a_role_of_its_own_are_sent_as_they_are() -> None:
    prompt = load_instructions("builtin").prompt(role(judge="Q {question} A {answer}: 0 to 3?"), QUESTION, "{question}")
    assert prompt.messages == ({"role": "user", "content": "Q Why {answer}? A {question}: 0 to 3?"},)
    assert prompt.scale == Scale()


def test_a_traits_own_instructions_may_ask_for_a_hundred_and_are_turned_round_for_its_negative_pole() -> None:
    text = "{question} {answer}\n- REFUSAL if it refused\n- A score from 0 (not at all) to 100 (strongly)"
    scales = {
        pole: load_instructions("builtin").prompt(role(judge=text, pole=pole), QUESTION, "").scale
        for pole in ("positive", "negative")
    }
    assert scales == {"positive": Scale(top=100), "negative": Scale(top=100, reverse=True)}
    assert scales["positive"].score(75) == 2.25
    assert scales["negative"].score(75) == 0.75


def test_several_turns_are_shown_with_their_speakers() -> None:
    talk = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    text = load_instructions("builtin").prompt(role(), talk, "Then.").messages[1]["content"]
    assert "[user]\nWhy {answer}?\n\n[assistant]\nSo.\n\n[user]\nAnd?\n=== answer ===\nThen." in text


def test_an_answer_that_could_not_be_read_is_asked_about_again() -> None:
    instructions = load_instructions("builtin")
    first = instructions.prompt(role(), QUESTION, "Boo")
    again = instructions.again(first, "x" * 9000)
    assert again.messages[:-2] == first.messages
    assert again.messages[-2] == {"role": "assistant", "content": "x" * 500}
    assert again.messages[-1]["content"].startswith("That could not be read as a rating.")


def test_every_text_enters_the_hash(tmp_path: Path) -> None:
    builtin = load_instructions("builtin")
    document = {name: getattr(builtin, name) for name in ("version", *TEXTS)}
    file = tmp_path / "judge.yaml"
    hashes = {builtin.hash}
    for name in document.keys() - {"version"}:
        file.write_text(yaml.safe_dump({**document, name: document[name] + "!"}))
        hashes.add(load_instructions(str(file)).hash)
    assert len(hashes) == len(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": None}, r"judge.instructions: .*: role is None; expected a text."),
        ({"trait": "only {question}"}, r"judge.instructions: .*: trait lacks \{description\} and \{answer\}."),
        ({"version": "one"}, r"judge.instructions: .*: version is 'one'; expected a whole number."),
        ({"extra": "x"}, r"judge.instructions: .*: has \['extra', .*; it needs \['form', 'reminder', 'role'"),
    ],
)
def test_unusable_instructions_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    builtin = load_instructions("builtin")
    document = {name: getattr(builtin, name) for name in ("version", *TEXTS)}
    file = tmp_path / "judge.yaml"
    file.write_text(yaml.safe_dump({**document, **change}))
    with pytest.raises(InputError, match=message):
        load_instructions(str(file))


@pytest.mark.skipif(not ROLES.is_dir(), reason="NOT TESTED: the reference project's roles are not here")
def test_the_reference_projects_instructions_are_used_as_they_are() -> None:
    text = json.loads((ROLES / "ghost.json").read_text())["eval_prompt"]
    prompt = load_instructions("builtin").prompt(role(judge=text), QUESTION, "Boo")
    content = prompt.messages[0]["content"]
    assert content.startswith(text[: text.index("{question}")] + "Why {answer}?\n")
    assert content.endswith("\nBoo" + text[text.index("{answer}") + len("{answer}") :])
    assert prompt.scale == Scale()


@pytest.mark.parametrize(("name", "labels"), [("speaker", "human"), ("harm", "redirected")])
def test_judges_of_categories_that_ship(name: str, labels: str) -> None:
    """They ask the same of everybody, whatever role it is."""
    instructions = load_instructions(name)
    assert len(instructions.labels) == 4
    assert labels in instructions.labels
    plain = instructions.prompt(role(), QUESTION, "Boo")
    assert instructions.prompt(role(judge="Q {question}"), QUESTION, "Boo") == plain
    assert instructions.prompt(role(pole="negative"), QUESTION, "Boo") == plain
    assert "Why {answer}?\n=== answer ===\nBoo" in plain.messages[1]["content"]
    assert all(f"\n{number}  " in plain.messages[1]["content"] for number in range(4))
    assert len({load_instructions(other).hash for other in ("builtin", "speaker", "harm")}) == 3


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["a", "b", "c", "c"], ["a", "b", "c", ""], "abcd", [1, 2, 3, 4]])
def test_labels_are_four_names(tmp_path: Path, labels: Any) -> None:
    document = {"version": 1, "system": "", "role": "{question} {answer}", "form": "f", "reminder": "r"}
    file = tmp_path / "judge.yaml"
    file.write_text(yaml.safe_dump({**document, "labels": labels}))
    with pytest.raises(InputError, match="give 4 different names"):
        load_instructions(str(file))
    file.write_text(yaml.safe_dump({**document, "labels": list("abcd"), "trait": "{description}"}))
    with pytest.raises(InputError, match="it needs"):
        load_instructions(str(file))
    file.write_text(yaml.safe_dump({**document, "labels": list("abcd")}))
    assert load_instructions(str(file)).labels == tuple("abcd")
