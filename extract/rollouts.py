"""From planned rows and responses to stored rollouts, and from those to micro-batches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import AuditorConfig, GenerateConfig
from personaspace.extract.generate.conversations import Talk
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.packing import MicroBatch, Segment, form_batches
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.reductions import Readout
from personaspace.extract.spans import Conversation, continue_conversation, locate
from personaspace.extract.turns import UnstableBoundaryError
from personaspace.store.rollouts import Rollout, decode_spans

AWAITED = "not generated yet"


def generated_rollout(
    planned: PlannedRollout,
    role: str,
    prompt: Sequence[int],
    response: Response,
    *,
    chat: ChatFormat,
    config: GenerateConfig,
    max_positions: int | None,
    maker: str | None = None,
) -> Rollout:
    """The rollout of a sampled response; dropped, with the reason, if there is nothing to average.

    ``maker`` of the engine.
    """
    conversation = Conversation(prompt=list(prompt), response=response.token_ids, spans=[])
    dropped = None
    try:
        conversation = continue_conversation(chat, planned.messages, prompt, response.token_ids)
    except UnstableBoundaryError as error:
        dropped = str(error)
    return _rollout(
        planned,
        role,
        conversation,
        response.text,
        response.finish_reason,
        chat.template_hash,
        sampling=_sampling(config, maker),
        seed=rollout_seed(config.seed, planned.noise_id),
        dropped=response.unusable or dropped or why_dropped(conversation, response.text, max_positions),
    )


def held_rollout(
    planned: PlannedRollout,
    role: str,
    talk: Talk,
    *,
    chat: ChatFormat,
    config: GenerateConfig,
    auditor: AuditorConfig,
    max_positions: int | None,
    maker: str | None = None,
) -> Rollout:
    """The rollout of a conversation of several turns; dropped, with the reason, if it broke off.

    ``maker`` of the engine.
    """
    assert planned.script is not None
    user: dict[str, str] = {"played_by": auditor.played_by}
    if auditor.played_by != "script":
        user |= {"persona": planned.script.user}
    if auditor.played_by == "endpoint":
        user |= {"model": str(auditor.endpoint.model)}
    return _rollout(
        replace(planned, messages=talk.messages),
        role,
        talk.conversation,
        talk.response.text,
        talk.response.finish_reason,
        chat.template_hash,
        sampling={**_sampling(config, maker), "turns": [asdict(turn) for turn in talk.turns], "user": user},
        seed=rollout_seed(config.seed, planned.noise_id),
        dropped=talk.dropped or why_dropped(talk.conversation, talk.response.text, max_positions),
    )


def imported_rollout(planned: PlannedRollout, role: str, *, chat: ChatFormat, max_positions: int | None) -> Rollout:
    """The rollout of a finished response; dropped, with the reason, if its tokens can't be told apart."""
    assert planned.response is not None
    conversation = Conversation(prompt=[], response=[], spans=[])
    try:
        conversation = locate(chat, [*planned.messages, {"role": "assistant", "content": planned.response}])
        dropped = why_dropped(conversation, planned.response, max_positions)
    except UnstableBoundaryError as error:
        dropped = str(error)
    return _rollout(
        planned,
        role,
        conversation,
        planned.response,
        "imported",
        chat.template_hash,
        sampling=planned.origin,
        seed=0,
        dropped=dropped,
    )


def awaited_rollout(planned: PlannedRollout, role: str, *, chat: ChatFormat) -> Rollout:
    """A rollout as it stands before its response is sampled."""
    conversation = Conversation(prompt=chat.encode_prompt(planned.messages), response=[], spans=[])
    return _rollout(planned, role, conversation, "", AWAITED, chat.template_hash, sampling={}, seed=0, dropped=None)


def quarantined_rollout(planned: PlannedRollout, role: str, *, chat: ChatFormat, reason: str) -> Rollout:
    """A rollout that can't be sampled, dropped with the reason."""
    conversation = Conversation(prompt=chat.encode_prompt(planned.messages), response=[], spans=[])
    return _rollout(
        planned, role, conversation, "", "quarantined", chat.template_hash, sampling={}, seed=0, dropped=reason
    )


def why_dropped(conversation: Conversation, response: str, max_positions: int | None) -> str | None:
    """Why a conversation can't be averaged, or None. ``max_positions``: the model's context in tokens, if known."""
    if not conversation.response:
        return "the response is empty" if not response else "the response is only white space"
    if not response.strip():
        return "the response is only white space"
    if not conversation.prompt:
        return "no prompt before the response"
    if not any(span.part == "whole" for span in conversation.spans):
        return "no span holds a whole assistant turn"
    total = len(conversation.prompt) + len(conversation.response)
    if max_positions is not None and total > max_positions:
        return f"{total} tokens exceed the model's context of {max_positions}"
    return None


def micro_batches(rollouts: pa.Table, readout: Readout, token_budget: int, *, packed: bool) -> list[MicroBatch]:
    """Micro-batches of a window's rollouts, a pure function of their rows and lengths. Dropped ones are left out."""
    columns = rollouts.select(["row", "prompt_token_ids", "response_token_ids", "spans", "dropped"]).to_pylist()
    tokens: dict[int, tuple[int, ...]] = {}
    segments: dict[int, tuple[Segment, ...]] = {}
    begins: dict[int, int] = {}
    for entry in columns:
        if entry["dropped"] is None:
            tokens[entry["row"]] = (*entry["prompt_token_ids"], *entry["response_token_ids"])
            segments[entry["row"]] = readout.segments(decode_spans(entry["spans"]))
            begins[entry["row"]] = len(entry["prompt_token_ids"])
    return form_batches(tokens, segments, token_budget, packed=packed, begins=begins)


def _sampling(config: GenerateConfig, maker: str | None) -> dict[str, Any]:
    told = {"temperature": config.temperature, "top_p": config.top_p, "max_new_tokens": config.max_new_tokens}
    return told if maker is None else {**told, "maker": maker}


def _rollout(
    planned: PlannedRollout,
    role: str,
    conversation: Conversation,
    text: str,
    finish_reason: str,
    template_hash: str,
    *,
    sampling: Mapping[str, Any],
    seed: int,
    dropped: str | None,
) -> Rollout:
    place = asdict(planned)
    del place["response"], place["messages"], place["script"], place["origin"], place["plain_id"]
    return Rollout(
        **place,
        role=role,
        messages=[dict(message) for message in planned.messages],
        response=text,
        prompt_token_ids=conversation.prompt,
        response_token_ids=conversation.response,
        spans=conversation.spans if dropped is None else [],
        finish_reason=finish_reason,
        template_hash=template_hash,
        sampling=json.dumps(sampling, sort_keys=True),
        seed=seed,
        dropped=dropped,
    )
