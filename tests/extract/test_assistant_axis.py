"""assistant-axis files: what is read, and which line of which file is refused, and why."""

import json
from pathlib import Path
from typing import Any

import pytest

from personaspace.extract.assistant_axis import read_questions, read_responses, read_roles
from personaspace.store.errors import InputError

USER = {"role": "user", "content": "Who are you?"}
NEEDS = 'needs `instruction`, a list of {"pos": "system prompt"}'
ANSWER = {"role": "assistant", "content": "A ghost."}
LINE: dict[str, Any] = {
    "system_prompt": "",
    "prompt_index": 2,
    "question_index": 17,
    "question": "Who are you?",
    "label": "pos",
    "conversation": [USER, ANSWER],
}


def test_roles_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "poet.json").write_text(json.dumps({"instruction": [{"pos": "Write.", "neg": "Don't."}]}))
    ghost = {"instruction": [{"pos": "Haunt."}, {"pos": "Böo."}], "questions": ["Where?"], "eval_prompt": "{answer}"}
    (tmp_path / "ghost.json").write_text(json.dumps(ghost, ensure_ascii=False), encoding="utf-8")
    assert read_roles(tmp_path) == [("ghost", ("Haunt.", "Böo.")), ("poet", ("Write.",))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "Haunt."}', NEEDS + "; it has ['prompt']."),
        (b'{"instruction": []}', NEEDS + "; it has ['instruction']."),
        (b'{"instruction": [{"neg": "No."}]}', "every entry of `instruction` needs a text under `pos`."),
        (b'{"instruction": ["Haunt."]}', "every entry of `instruction` needs a text under `pos`."),
        (b'{"instruction": ', "not valid JSON: Expecting value"),
        (b'{"instruction": "\xff"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'[{"pos": "Haunt."}, {"pos": "Boo."}]', NEEDS),
    ],
)
def test_refused_role_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "ghost.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_roles(tmp_path)
    assert str(error.value).startswith(f"{file}: {message}")


def test_folder_without_roles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no ROLE\.json files"):
        read_roles(tmp_path)


def test_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "Who are you?", "id": 4}\n{"question": "Why?"}\n')
    assert read_questions(file) == [("aa4", "Who are you?"), ("aa1", "Why?")]
    file.write_text('{"question": "Who are you?"}\n{"text": "Why?", "id": 1}\n')
    with pytest.raises(InputError) as error:
        read_questions(file)
    assert str(error.value) == f"{file}:2: has keys ['id', 'text']; expected a text under `question`."


def test_responses_without_empty_system_messages(tmp_path: Path) -> None:
    with_empty = LINE | {"conversation": [{"role": "system", "content": ""}, USER, ANSWER]}
    (tmp_path / "ghost.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps(with_empty) + "\n")
    first, second = read_responses(tmp_path)
    assert first.conversation == second.conversation == (USER, ANSWER)
    assert (first.role, first.prompt, first.question, first.question_text) == ("ghost", 2, 17, "Who are you?")
    assert second.where == f"{tmp_path / 'ghost.jsonl'}:2"


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in LINE.items() if name != key}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question":', "not a line of UTF-8 JSON: Expecting value"),
        (b'{"question": "\xff"}', "not a line of UTF-8 JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[1, 2]", "expected a JSON object."),
        (without("label"), "lacks label."),
        (LINE | {"conversation": [USER]}, "the conversation does not end with an assistant turn."),
        (LINE | {"conversation": []}, "the conversation does not end with an assistant turn."),
        (LINE | {"conversation": [USER, {"role": "assistant"}]}, ""),
        (LINE | {"prompt_index": "first"}, ""),
        (LINE | {"conversation": ["Who are you?", "A ghost."]}, ""),
    ],
)
def test_broken_response_names_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    file = tmp_path / "ghost.jsonl"
    file.write_bytes(json.dumps(LINE).encode() + b"\n" + raw + b"\n")
    with pytest.raises(InputError) as error:
        read_responses(tmp_path)
    assert str(error.value).startswith(f"{file}:2: {message}")


def test_folder_without_responses(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_responses(tmp_path)
    assert str(error.value) == f"generate.responses: {tmp_path} holds no ROLE.jsonl files."
