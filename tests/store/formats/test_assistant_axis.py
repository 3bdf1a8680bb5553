"""assistant-axis files: what is read, and which line of which file is refused, and why."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.store.errors import InputError
from personaspace.store.formats.assistant_axis import (
    Persona,
    Response,
    iter_responses,
    question_numbers,
    read_personas,
    read_questions,
    read_responses,
    write_responses,
)
from personaspace.store.formats.assistant_axis_scores import write_scores

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
    assert read_personas(tmp_path) == [
        Persona(name="ghost", positive=("Haunt.", "Böo."), negative=(), judge="{answer}"),
        Persona(name="poet", positive=("Write.",), negative=("Don't.",), judge=""),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "Haunt."}', NEEDS + "; it has ['prompt']."),
        (b'{"instruction": []}', NEEDS + "; it has ['instruction']."),
        (b'{"instruction": [{"neg": "No."}]}', "every entry of `instruction` needs a text under `pos`."),
        (b'{"instruction": ["Haunt."]}', "every entry of `instruction` needs a text under `pos`."),
        (b'{"instruction": ', "not valid JSON: Expecting value"),
        (b'{"instruction": "\xff"}', "not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"instruction": [{"pos": "A.", "neg": "B."}, {"pos": "C."}]}', "a trait needs a text under `neg` in every"),
        (b'{"instruction": [{"pos": "A."}], "eval_prompt": 7}', "eval_prompt is 7; expected a text."),
        (b'[{"pos": "Haunt."}, {"pos": "Boo."}]', NEEDS),
    ],
)
def test_refused_role_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "ghost.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_personas(tmp_path)
    assert str(error.value).startswith(f"{file}: {message}")


def test_folder_without_roles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no ROLE\.json files"):
        read_personas(tmp_path)


def test_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "Who are you?", "id": 4}\n{"question": "Why?"}\n')
    assert read_questions(file) == [("aa4", "Who are you?"), ("aa1", "Why?")]
    file.write_text('{"question": "Who are you?"}\n{"text": "Why?", "id": 1}\n')
    with pytest.raises(InputError) as error:
        read_questions(file)
    assert str(error.value) == f"{file}:2: has keys ['id', 'text']; expected a text under `question`."


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["aa40", "aa0", "aa7"], [40, 0, 7]),
        (["q1", "q2"], [0, 1]),
        (["aa4", "q2"], [0, 1]),
        (["aa4", "aa04"], [0, 1]),
        ([], []),
    ],
)
def test_indices_of_questions_from_their_ids(ids: list[str], numbers: list[int]) -> None:
    assert question_numbers(ids) == numbers


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
    assert str(error.value) == f"{tmp_path}: holds no ROLE.jsonl files."


def test_responses_stream_role_by_role(tmp_path: Path) -> None:
    (tmp_path / "ghost.jsonl").write_text(json.dumps(LINE | {"system_prompt": "Haunt."}) + "\n")
    (tmp_path / "poet.jsonl").write_text("broken")
    roles = iter_responses(tmp_path)
    role, (response,) = next(roles)
    assert (role, response.system_prompt) == ("ghost", "Haunt.")
    with pytest.raises(InputError, match=r"poet\.jsonl:1: not a line"):
        next(roles)


@given(
    st.lists(
        st.builds(
            Response,
            role=st.just("ghost"),
            prompt=st.integers(0, 999_999_999),
            question=st.integers(0, 999_999_999),
            question_text=st.text(),
            label=st.sampled_from(["pos", "neg", "default"]),
            system_prompt=st.text(),
            conversation=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text())).map(
                lambda turns: tuple(
                    {"role": role, "content": content} for role, content in [*turns, ("assistant", "Boo.")]
                )
            ),
        ),
        unique_by=lambda response: (response.label, response.prompt, response.question),
    )
)
def test_responses_round_trip(responses: list[Response]) -> None:
    with TemporaryDirectory() as folder:
        write_responses(Path(folder), "ghost", responses)
        found = read_responses(Path(folder))
    turns = [tuple(t for t in r.conversation if t["role"] != "system" or t["content"]) for r in responses]
    assert [replace(response, where="") for response in found] == [
        replace(response, conversation=conversation) for response, conversation in zip(responses, turns, strict=True)
    ]


def test_written_lines_have_the_keys_of_the_project(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ghost.jsonl").write_text(json.dumps(LINE) + "\n")
    file = write_responses(tmp_path / "out", "ghost", read_responses(tmp_path / "in"))
    assert file == tmp_path / "out" / "ghost.jsonl"
    assert file.read_bytes() == (tmp_path / "in" / "ghost.jsonl").read_bytes()


def response(**changes: Any) -> Response:
    fields: dict[str, Any] = {"role": "ghost", "prompt": 2, "question": 17, "question_text": "Who?", "label": "pos"}
    return Response(**(fields | {"conversation": (USER, ANSWER)} | changes))


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([response(), response()], "response 2: pos_p2_q17 is there already; the format has one sample of each"),
        ([response(role="poet")], "response 1: is of role 'poet'; one file holds one role."),
        ([response(conversation=(USER,))], "response 1: the conversation does not end with an assistant turn."),
        ([response(label="maybe")], "key 'maybe_p2_q17' is not of the form LABEL_pPROMPT_qQUESTION"),
        ([response(prompt=-1)], "key 'pos_p-1_q17' is not of the form"),
    ],
)
def test_refused_responses_leave_no_file(tmp_path: Path, responses: list[Response], message: str) -> None:
    with pytest.raises(InputError) as error:
        write_responses(tmp_path, "ghost", responses)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("role", ["../ghost", "/etc/ghost", "", ".", "..", "a/b", ".ghost", "ghost\x00", "a\\b"])
def test_no_role_leaves_the_folder(tmp_path: Path, role: str) -> None:
    with pytest.raises(InputError, match="can't be a file name"):
        write_responses(tmp_path / "out", role, [response(role=role)])
    with pytest.raises(InputError, match="can't be a file name"):
        write_scores(tmp_path / "out", role, {"pos_p0_q0": 3})
    assert list(tmp_path.iterdir()) == []


def test_responses_are_overwritten_only_on_demand(tmp_path: Path) -> None:
    write_responses(tmp_path, "ghost", [response()])
    with pytest.raises(InputError, match=r"ghost\.jsonl: exists already"):
        write_responses(tmp_path, "ghost", [])
    write_responses(tmp_path, "ghost", [], overwrite=True)
    assert read_responses(tmp_path) == []
