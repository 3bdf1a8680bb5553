"""Responses as users have them: what can't be read is refused with its line, what can't be averaged is dropped."""

from pathlib import Path

import pytest

from personaspace.cli import main
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Committed, Event
from personaspace.cluster.generation import generate
from personaspace.cluster.session import hold_run
from personaspace.extract.chat import Message
from tests.cluster.small_jobs import config_for, job_of, response_line, talk, write_responses
from tests.models import CHATML, NO_SYSTEM, tiny_checkpoint

ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
"""Like Mistral's and Gemma's."""
SYSTEM: Message = {"role": "system", "content": "You are a ghost."}
SOUND = talk("Who are you?", "A ghost.")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chat template -> a model that has it."""
    return {
        template: tiny_checkpoint(tmp_path_factory.mktemp("model"), chat_template=template)
        for template in (CHATML, NO_SYSTEM, ALTERNATING)
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"prompt_index": 0, "conversation": "\xff\xfe"}',
            "'utf-8' codec can't decode byte 0xff in position 37: invalid start byte",
        ),
        (b'{"prompt_index": 0, "quest', "Unterminated string starting at: line 1 column 21 (char 20)"),
    ],
    ids=["invalid UTF-8", "cut off"],
)
def test_a_line_that_can_t_be_read_is_named(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str], line: bytes, message: str
) -> None:
    file, error = refusal(tmp_path, models[CHATML], capsys, line)
    assert error == f"error: {file}:2: not a line of UTF-8 JSON: {message}\n"


def test_half_a_character_is_named(tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of an emoji, as cutting a text to a length leaves it."""
    line = response_line(1, talk("Hm?", "b \ud83d")).encode()
    assert b"\\ud83d" in line
    file, error = refusal(tmp_path, models[CHATML], capsys, line)
    assert error.startswith(f"error: {file}:2: ")


def test_a_response_that_is_there_twice_is_named(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = response_line(0, SOUND).encode()
    file, error = refusal(tmp_path, models[CHATML], capsys, line)
    assert error == f"error: {file}:2: the same response as {file}:1; remove one of the two.\n"


def refusal(folder: Path, model: Path, capsys: pytest.CaptureFixture[str], line: bytes) -> tuple[Path, str]:
    """The file in which the line comes after a sound one, and how the command refuses it; nothing is written."""
    responses = write_responses(folder / "responses", {"default": [SOUND], "ghost": [SOUND]})
    file = responses / "ghost.jsonl"
    file.write_bytes(file.read_bytes() + line + b"\n")
    config = folder / "config.yaml"
    config.write_text(f"model: {{id: {model}}}\ngenerate: {{responses: {responses}}}\nstore: {{root: {folder}/runs}}\n")
    assert main(["run", str(config)]) == 2
    assert not (folder / "runs").exists()
    return file, capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "conversation", "reason"),
    [
        (CHATML, talk("Who?", ""), "the response is empty"),
        (CHATML, talk("Who?", " \n\t"), "the response is only white space"),
        (CHATML, talk("Speak on.", "so it goes, " * 40), "376 tokens exceed the model's context of 256"),
        (
            CHATML,
            [{"role": "narrator", "content": "Night."}, *SOUND],
            "message 0 has the role 'narrator'; allowed are system, user, assistant",
        ),
        (
            CHATML,
            [{"role": "narrator", "content": "Night."}, *talk("Who?", "")],
            "message 0 has the role 'narrator'; allowed are system, user, assistant",
        ),
        (
            ALTERNATING,
            [*talk("Who?"), *SOUND],
            "the chat template refuses the conversation: Conversation roles must alternate",
        ),
        (
            ALTERNATING,
            [*talk("Who?"), *talk("Who are you?", "")],
            "the chat template refuses the conversation: Conversation roles must alternate",
        ),
        (
            NO_SYSTEM,
            [SYSTEM, {"role": "assistant", "content": "Boo."}],
            "the chat template refuses the conversation: System role not supported",
        ),
        (
            NO_SYSTEM,
            [SYSTEM, {"role": "assistant", "content": ""}],
            "the chat template refuses the conversation: System role not supported",
        ),
    ],
)
def test_what_can_t_be_averaged_is_dropped_and_costs_no_other(
    tmp_path: Path, models: dict[str, Path], template: str, conversation: list[Message], reason: str
) -> None:
    assert dropped(tmp_path, models[template], conversation) == {2: reason}


def test_an_answer_to_nobody_is_one_all_the_same(tmp_path: Path, models: dict[str, Path]) -> None:
    """The template's own tokens are the prompt."""
    assert dropped(tmp_path, models[CHATML], [{"role": "assistant", "content": "Is anybody there?"}]) == {}


def dropped(folder: Path, model: Path, conversation: list[Message]) -> dict[int, str]:
    """Row -> reason once the conversation was imported behind two sound ones."""
    conversations = {"default": [SOUND, talk("Where?", "In the attic.")], "ghost": [conversation]}
    responses = write_responses(folder / "responses", conversations)
    job = job_of(config_for(model, responses, folder, "run"))
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        generate(job, fence, ClusterConfig(), events.append)
    return {row: why for event in events if isinstance(event, Committed) for row, why in event.dropped.items()}
