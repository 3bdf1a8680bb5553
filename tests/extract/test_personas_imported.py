"""Plans of finished assistant-axis responses."""

import json
from pathlib import Path

import pytest

from personaspace.extract.personas import plan_imported
from personaspace.store.errors import InputError


def response(prompt: int, question: int, answer: str, label: str = "pos") -> str:
    conversation = [
        {"role": "system", "content": f"Prompt {prompt}."},
        {"role": "user", "content": f"Question {question}?"},
        {"role": "assistant", "content": answer},
    ]
    line = {"prompt_index": prompt, "question_index": question, "question": f"Question {question}?", "label": label}
    return json.dumps(line | {"conversation": conversation}) + "\n"


def test_plan_of_imported_responses(tmp_path: Path) -> None:
    (tmp_path / "ghost.jsonl").write_text(response(3, 40, "Boo.") + response(1, 20, "Woo."))
    (tmp_path / "default.jsonl").write_text(response(0, 20, "Hello.", "default"))
    made = plan_imported(tmp_path)
    assert [role.id for role in made.roles] == ["default", "ghost"]
    assert made.roles[1].prompts == ("Prompt 1.", "Prompt 3.")
    assert [(question.id, question.text) for question in made.questions] == [
        ("aa20", "Question 20?"),
        ("aa40", "Question 40?"),
    ]
    assert [row.response for row in made.rows] == ["Hello.", "Boo.", "Woo."]
    assert made.rows[1].messages[-1] == {"role": "user", "content": "Question 40?"}
    assert [row.question for row in made.rows] == [0, 1, 0]


def test_prompt_is_an_index_into_the_prompts_of_the_role(tmp_path: Path) -> None:
    (tmp_path / "ghost.jsonl").write_text(response(3, 40, "Boo.") + response(1, 20, "Woo."))
    made = plan_imported(tmp_path)
    assert [made.roles[0].prompts[row.prompt] for row in made.rows] == ["Prompt 3.", "Prompt 1."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (response(0, 0, "No.", "neg"), "ghost.jsonl:1: label is 'neg'; only roles ('pos', 'default') can be imported."),
        (response(0, 0, "Boo.") * 2, "remove one of the two."),
    ],
)
def test_refused_imports(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "ghost.jsonl").write_text(content)
    with pytest.raises(InputError) as error:
        plan_imported(tmp_path)
    assert str(error.value).endswith(message)
