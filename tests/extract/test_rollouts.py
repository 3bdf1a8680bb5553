"""Stored rollouts: every dropped one says why, and only the others are packed for the forward pass."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.reductions import Readout
from personaspace.extract.rollouts import (
    AWAITED,
    awaited_rollout,
    generated_rollout,
    imported_rollout,
    micro_batches,
    why_dropped,
)
from personaspace.extract.spans import Conversation
from personaspace.store.rollouts import Rollout, Span, decode_rollouts, encode_rollouts
from tests.models import CHATML, NO_SYSTEM

ChatWith = Callable[..., ChatFormat]
SYSTEM = {"role": "system", "content": "Be a ghost."}
USER = {"role": "user", "content": "Who are you?"}
MESSAGES = (SYSTEM, USER)
CONFIG = GenerateConfig(max_new_tokens=8, seed=3)
MEAN = Readout(sites=("resid_post",), reductions=("mean",), parts=())
ALL = Readout(sites=("resid_post",), reductions=("mean", "last_prompt", "first_2"), parts=("whole", "think", "answer"))


def planned(row: int = 0, response: str | None = None, messages: tuple[Message, ...] = MESSAGES) -> PlannedRollout:
    return PlannedRollout(
        row=row, role_id=1, prompt=2, question=3, sample=0, rollout_id="id", messages=messages, response=response
    )


def generate(
    chat: ChatFormat,
    text: str,
    *,
    row: int = 0,
    messages: tuple[Message, ...] = MESSAGES,
    max_positions: int | None = None,
) -> Rollout:
    response = Response(token_ids=chat.encode_text(text), text=text, finish_reason="stop")
    return generated_rollout(
        planned(row, messages=messages),
        "ghost",
        chat.encode_prompt(messages),
        response,
        chat=chat,
        config=CONFIG,
        max_positions=max_positions,
    )


def take_in(
    chat: ChatFormat, text: str, *, messages: tuple[Message, ...] = MESSAGES, max_positions: int | None = None
) -> Rollout:
    """The imported rollout."""
    return imported_rollout(planned(response=text, messages=messages), "ghost", chat=chat, max_positions=max_positions)


def whole_and_answer(start: int, stop: int, turn: int = 0) -> list[Span]:
    return [Span(turn=turn, part=part, start=start, stop=stop) for part in ("whole", "answer")]


def test_generated_rollout(chat_with: ChatWith) -> None:
    chat = chat_with()
    rollout = generate(chat, "A ghost.")
    prompt, response = chat.encode_prompt(MESSAGES), chat.encode_text("A ghost.")
    assert rollout.dropped is None
    assert (rollout.role, rollout.role_id, rollout.prompt, rollout.question) == ("ghost", 1, 2, 3)
    assert rollout.messages == list(MESSAGES)
    assert (rollout.prompt_token_ids, rollout.response_token_ids) == (prompt, response)
    assert rollout.spans == whole_and_answer(len(prompt), len(prompt) + len(response))
    assert rollout.template_hash == chat.template_hash
    assert json.loads(rollout.sampling) == {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    assert rollout.seed == rollout_seed(3, "id")


@given(st.text(st.sampled_from("abghost  .,?\n👻漢"), min_size=1).map(str.strip).filter(bool))
def test_imported_rollout_has_the_tokens_and_spans_of_a_generated_one(chat_with: ChatWith, text: str) -> None:
    imported, generated = take_in(chat_with(), text), generate(chat_with(), text)
    assert imported.dropped is None
    different = ("finish_reason", "sampling", "seed")
    assert {name: value for name, value in asdict(imported).items() if name not in different} == {
        name: value for name, value in asdict(generated).items() if name not in different
    }
    assert (imported.finish_reason, imported.sampling, imported.seed) == ("imported", "{}", 0)


def test_conversation_of_several_turns(chat_with: ChatWith) -> None:
    chat = chat_with()
    messages = (USER, {"role": "assistant", "content": "You see one."}, USER)
    first = len(chat.encode_prompt([USER]))
    spans = whole_and_answer(first, first + len(chat.encode_text("You see one.")))
    prompt = chat.encode_prompt(messages)
    spans += whole_and_answer(len(prompt), len(prompt) + len(chat.encode_text("A ghost.")), turn=1)
    for rollout in (generate(chat, "A ghost.", messages=messages), take_in(chat, "A ghost.", messages=messages)):
        assert (rollout.dropped, rollout.spans) == (None, spans)


def test_awaited_rollout(chat_with: ChatWith) -> None:
    chat = chat_with()
    rollout = awaited_rollout(planned(), "ghost", chat=chat)
    assert rollout.prompt_token_ids == chat.encode_prompt(MESSAGES)
    assert (rollout.response, rollout.response_token_ids, rollout.spans) == ("", [], [])
    assert (rollout.finish_reason, rollout.dropped) == (AWAITED, None)


@pytest.mark.parametrize("make", [generate, take_in])
def test_reasons(chat_with: ChatWith, make: Callable[..., Rollout]) -> None:
    chat = chat_with()
    total = len(chat.encode_prompt(MESSAGES)) + len(chat.encode_text("A ghost."))
    too_long = f"{total} tokens exceed the model's context of {total - 1}"
    assert make(chat, "A ghost.", max_positions=total).dropped is None
    dropped = [make(chat, "A ghost.", max_positions=total - 1), make(chat, ""), make(chat, " \n ")]
    assert [rollout.dropped for rollout in dropped] == [
        too_long,
        "the response is empty",
        "the response is only white space",
    ]
    assert all(rollout.spans == [] for rollout in dropped)
    assert dropped[0].response_token_ids == chat.encode_text("A ghost.")


STRADDLES = "a token straddles the boundary between response and template"


def test_import_with_an_unstable_boundary_is_dropped(chat_with: ChatWith) -> None:
    # ChatML puts a line break before the response, which merges with one at its beginning.
    rollout = take_in(chat_with(), "\n\nA ghost.")
    assert rollout.dropped == STRADDLES
    assert (rollout.prompt_token_ids, rollout.response_token_ids, rollout.spans) == ([], [], [])
    assert rollout.response == "\n\nA ghost."


def test_generated_response_after_a_turn_that_cannot_be_found_is_dropped(chat_with: ChatWith) -> None:
    chat = chat_with()
    messages = (USER, {"role": "assistant", "content": "\n\nA ghost."}, USER)
    rollout = generate(chat, "You see one.", messages=messages)
    assert (rollout.dropped, rollout.spans) == (STRADDLES, [])
    assert rollout.prompt_token_ids == chat.encode_prompt(messages)
    assert rollout.response_token_ids == chat.encode_text("You see one.")


@pytest.mark.parametrize(
    ("template", "messages", "response", "reason"),
    [
        (
            CHATML,
            ({"role": "tool", "content": "x"}, USER),
            "A ghost.",
            "message 0 has the role 'tool'; allowed are system, user, assistant",
        ),
        (
            NO_SYSTEM,
            (SYSTEM, SYSTEM, USER),
            "A ghost.",
            "the chat template refuses the conversation: System role not supported",
        ),
        (
            NO_SYSTEM,
            (SYSTEM, SYSTEM, USER),
            "",
            "the chat template refuses the conversation: System role not supported",
        ),
        (CHATML, MESSAGES, "<think>\n</think>", "the chat template leaves nothing of the response"),
    ],
)
def test_import_that_cannot_be_read_is_dropped(
    chat_with: ChatWith, template: str, messages: tuple[Message, ...], response: str, reason: str
) -> None:
    rollout = take_in(chat_with(template), response, messages=messages)
    assert (rollout.dropped, rollout.spans) == (reason, [])


def test_why_a_conversation_is_dropped() -> None:
    span = Span(turn=0, part="whole", start=0, stop=1)
    assert (
        why_dropped(Conversation(prompt=[], response=[5], spans=[span]), "A", None) == "no prompt before the response"
    )
    unspanned = Conversation(prompt=[4], response=[5], spans=[])
    assert why_dropped(unspanned, "A", None) == "no span holds a whole assistant turn"


def as_table(rollouts: list[Rollout]) -> pa.Table:
    return decode_rollouts(encode_rollouts(rollouts))


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_leave_dropped_rollouts_out(chat_with: ChatWith, packed: bool) -> None:
    chat = chat_with()
    texts = {5: "A ghost.", 6: "", 7: "A ghost who lingers in an old house.", 8: "You.", 9: " "}
    rollouts = {row: generate(chat, text, row=row) for row, text in texts.items()}
    batches = micro_batches(as_table(list(rollouts.values())), MEAN, 80, packed=packed)
    assert [row for batch in batches for row in batch.rows] == [7, 5, 8]
    assert all(batch.packed is packed for batch in batches)
    for batch in batches:
        for row, ids, segments in zip(batch.rows, batch.token_ids, batch.segments, strict=True):
            ((start, stop),) = segments
            assert list(ids[:start]) == rollouts[row].prompt_token_ids
            assert list(ids[start:stop]) == rollouts[row].response_token_ids
            assert stop == len(ids)


def test_micro_batches_sum_what_is_read_out(chat_with: ChatWith) -> None:
    chat = chat_with()
    rollouts = [generate(chat, "A ghost."), generate(chat, "<think>I am old.</think>A ghost.", row=1)]
    batches = micro_batches(as_table(rollouts), ALL, 400, packed=False)
    segments = {row: found for batch in batches for row, found in zip(batch.rows, batch.segments, strict=True)}
    assert segments == {row: ALL.segments(rollout.spans) for row, rollout in enumerate(rollouts)}
    assert [len(segments[row]) for row in (0, 1)] == [3 + 2, 3 + 3]


def test_micro_batches_of_nothing(chat_with: ChatWith) -> None:
    assert micro_batches(as_table([]), MEAN, 80, packed=False) == []
    assert micro_batches(as_table([generate(chat_with(), "")]), MEAN, 80, packed=True) == []
