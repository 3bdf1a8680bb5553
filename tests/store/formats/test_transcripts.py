"""Transcript files: what is read of them, and what is refused with the file's name."""

import json
from pathlib import Path
from typing import Any

import pytest

from personaspace.store.errors import InputError
from personaspace.store.formats.transcripts import first_turns, is_transcripts, read_transcripts

USER, ANSWER = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
TALK = [USER, ANSWER, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Well."}]


def write(file: Path, **entry: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"conversation": TALK} | entry))
    return file


def test_all_that_a_file_says_is_read(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    file = write(
        tmp_path / "a.json",
        model="meta-llama/Llama-3.3-70B-Instruct",
        auditor_model="anthropic/claude-sonnet-4.5",
        domain="coding",
        persona="A student.",
        topic="JAX or PyTorch?",
        conversation_id="coding_p0_t5_5",
        steering_config={"layers": [46]},
        conversation=[system, *TALK],
    )
    [read] = read_transcripts(file)
    assert (read.name, read.domain, read.topic, read.sample) == ("coding_p0_t5_5", "coding", "JAX or PyTorch?", 0)
    assert read.conversation == (system, *TALK)
    assert read.origin == {
        "written_by": "meta-llama/Llama-3.3-70B-Instruct",
        "user": {"played_by": "endpoint", "model": "anthropic/claude-sonnet-4.5", "persona": "A student."},
        "steering": {"layers": [46]},
    }


def test_a_conversation_is_enough_and_its_place_names_it(tmp_path: Path) -> None:
    write(tmp_path / "therapy" / "7.json", conversation=[{"role": "system", "content": ""}, *TALK, USER])
    write(tmp_path / "b.json")
    first, second = read_transcripts(tmp_path)
    assert (first.name, second.name) == ("b", "therapy.7")
    assert (second.domain, second.topic, second.origin) == ("unknown", "Hi.", {})
    assert second.conversation == tuple(TALK), "neither an empty system turn nor a question without its answer"


def test_a_conversation_is_cut_behind_an_answer() -> None:
    assert first_turns(tuple(TALK), 1) == (USER, ANSWER)
    assert first_turns(tuple(TALK), 2) == first_turns(tuple(TALK), 9) == first_turns(tuple(TALK), None) == tuple(TALK)


def test_transcripts_are_told_from_response_files(tmp_path: Path) -> None:
    assert not is_transcripts(tmp_path)
    file = write(tmp_path / "deep" / "a.json")
    assert is_transcripts(tmp_path)
    assert is_transcripts(file)
    (tmp_path / "ghost.jsonl").write_text("")
    assert not is_transcripts(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"conversation": None}, "needs `conversation`, a list of"),
        ({"conversation": [USER, {"role": "assistant"}]}, 'message 1 is not {"role": text, "content": text}.'),
        ({"conversation": [USER]}, "no assistant's turn in the conversation, so there is nothing to average."),
        ({"domain": "../up"}, "role name '../up' can't be a file name"),
        ({"conversation_id": "a/b"}, "role name 'a/b' can't be a file name"),
        ({"topic": 3}, "`topic` is 3; expected a text."),
        ({"sample": "one"}, "`sample` is 'one'; expected a number from 0 on."),
    ],
)
def test_refusals_name_the_file(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "a.json", **entry)
    with pytest.raises(InputError) as error:
        read_transcripts(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", scenario="coding.slow", sample=1)
    write(tmp_path / "b.json", scenario="coding.slow", sample=1)
    with pytest.raises(InputError, match=r"b\.json: is 'coding\.slow', sample 1, and so is .*a\.json; give one of the"):
        read_transcripts(tmp_path)
    write(tmp_path / "b.json", scenario="coding.slow", sample=2)
    assert [read.sample for read in read_transcripts(tmp_path)] == [1, 2]


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: not valid JSON"):
        read_transcripts(tmp_path)
