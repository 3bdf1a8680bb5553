"""Stored rollouts: every dropped one says why, and only the others are packed for the forward pass."""

import json
from collections.abc import Callable

import pyarrow as pa
import pytest

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import Response
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.rollouts import generated_rollout, imported_rollout, micro_batches
from personaspace.store.rollouts import Rollout, decode_rollouts, encode_rollouts

ChatWith = Callable[..., ChatFormat]
MESSAGES = ({"role": "system", "content": "Be a ghost."}, {"role": "user", "content": "Who are you?"})
CONFIG = GenerateConfig(max_new_tokens=8, seed=3)


def planned(row: int = 0, response: str | None = None) -> PlannedRollout:
    return PlannedRollout(
        row=row, role_id=1, prompt=2, question=3, sample=0, rollout_id="id", messages=MESSAGES, response=response
    )


def generate(chat: ChatFormat, text: str, *, row: int = 0, max_positions: int | None = None) -> Rollout:
    response = Response(token_ids=chat.encode_text(text), text=text, finish_reason="stop")
    prompt = chat.encode_prompt(MESSAGES)
    return generated_rollout(
        planned(row), "ghost", prompt, response, chat=chat, config=CONFIG, max_positions=max_positions
    )


def test_generated_rollout(chat_with: ChatWith) -> None:
    chat = chat_with()
    rollout = generate(chat, "A ghost.")
    assert rollout.dropped is None
    assert (rollout.role, rollout.role_id, rollout.prompt, rollout.question) == ("ghost", 1, 2, 3)
    assert rollout.prompt_token_ids == chat.encode_prompt(MESSAGES)
    assert rollout.response_token_ids == chat.encode_text("A ghost.")
    assert rollout.template_hash == chat.template_hash
    assert json.loads(rollout.sampling) == {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    assert rollout.seed == rollout_seed(3, "id")


def test_imported_rollout_has_the_tokens_of_a_generated_one(chat_with: ChatWith) -> None:
    chat = chat_with()
    imported = imported_rollout(planned(response="A ghost."), "ghost", chat=chat, max_positions=None)
    generated = generate(chat, "A ghost.")
    assert imported.finish_reason == "imported"
    assert imported.dropped is None
    assert imported.prompt_token_ids == generated.prompt_token_ids
    assert imported.response_token_ids == generated.response_token_ids


@pytest.mark.parametrize("imported", [False, True])
def test_reasons(chat_with: ChatWith, imported: bool) -> None:
    chat = chat_with()

    def reason(text: str, max_positions: int | None) -> str | None:
        if imported:
            return imported_rollout(planned(response=text), "ghost", chat=chat, max_positions=max_positions).dropped
        return generate(chat, text, max_positions=max_positions).dropped

    total = len(chat.encode_prompt(MESSAGES)) + len(chat.encode_text("A ghost."))
    assert reason("", None) == "empty response"
    assert reason("A ghost.", total - 1) == f"{total} tokens exceed the model's context of {total - 1}"
    assert reason("A ghost.", total) is None


def test_import_with_an_unstable_boundary_is_dropped(chat_with: ChatWith) -> None:
    # ChatML puts a line break before the response, which merges with one at its beginning.
    rollout = imported_rollout(planned(response="\n\nA ghost."), "ghost", chat=chat_with(), max_positions=None)
    assert rollout.dropped == "a token straddles the boundary between response and template"
    assert (rollout.prompt_token_ids, rollout.response_token_ids) == ([], [])
    assert rollout.response == "\n\nA ghost."


def as_table(rollouts: list[Rollout]) -> pa.Table:
    return decode_rollouts(encode_rollouts(rollouts))


def test_micro_batches_leave_dropped_rollouts_out(chat_with: ChatWith) -> None:
    chat = chat_with()
    texts = {5: "A ghost.", 6: "", 7: "A ghost who lingers in an old house.", 8: "You."}
    rollouts = {row: generate(chat, text, row=row) for row, text in texts.items()}
    batches = micro_batches(as_table(list(rollouts.values())), 80)
    assert [row for batch in batches for row in batch.rows] == [7, 5, 8]
    for batch in batches:
        for row, ids, (start, stop) in zip(batch.rows, batch.token_ids, batch.spans, strict=True):
            assert list(ids[:start]) == rollouts[row].prompt_token_ids
            assert list(ids[start:stop]) == rollouts[row].response_token_ids
            assert stop == len(ids)


def test_micro_batches_of_nothing(chat_with: ChatWith) -> None:
    assert micro_batches(as_table([]), 80) == []
    assert micro_batches(as_table([generate(chat_with(), "")]), 80) == []
