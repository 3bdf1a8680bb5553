"""From planned rows and responses to stored rollouts, and from those to micro-batches."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import pyarrow as pa

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import Response
from personaspace.extract.packing import MicroBatch, batch_by_length
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.spans import UnstableBoundaryError, locate_response
from personaspace.store.rollouts import Rollout


def generated_rollout(
    planned: PlannedRollout,
    role: str,
    prompt: Sequence[int],
    response: Response,
    *,
    chat: ChatFormat,
    config: GenerateConfig,
    max_positions: int | None,
) -> Rollout:
    """The rollout of a sampled response; dropped, with the reason, if there is nothing to average."""
    return _rollout(
        planned,
        role,
        prompt,
        response.token_ids,
        response.text,
        response.finish_reason,
        chat.template_hash,
        sampling={"temperature": config.temperature, "top_p": config.top_p, "max_new_tokens": config.max_new_tokens},
        seed=rollout_seed(config.seed, planned.rollout_id),
        dropped=_reason(len(prompt), len(response.token_ids), max_positions),
    )


def imported_rollout(planned: PlannedRollout, role: str, *, chat: ChatFormat, max_positions: int | None) -> Rollout:
    """The rollout of a finished response; dropped, with the reason, if its tokens can't be told apart."""
    assert planned.response is not None
    prompt: list[int] = []
    token_ids: list[int] = []
    try:
        prompt, token_ids = locate_response(chat, planned.messages, planned.response)
        dropped = _reason(len(prompt), len(token_ids), max_positions)
    except UnstableBoundaryError as error:
        dropped = str(error)
    return _rollout(
        planned,
        role,
        prompt,
        token_ids,
        planned.response,
        "imported",
        chat.template_hash,
        sampling={},
        seed=0,
        dropped=dropped,
    )


def micro_batches(rollouts: pa.Table, token_budget: int) -> list[MicroBatch]:
    """Micro-batches of a window's rollouts, a pure function of their rows and lengths. Dropped ones are left out."""
    columns = rollouts.select(["row", "prompt_token_ids", "response_token_ids", "dropped"]).to_pylist()
    prompts = {entry["row"]: entry["prompt_token_ids"] for entry in columns if entry["dropped"] is None}
    responses = {entry["row"]: entry["response_token_ids"] for entry in columns if entry["dropped"] is None}
    lengths = {row: len(prompts[row]) + len(responses[row]) for row in prompts}
    return [
        MicroBatch(
            rows=rows,
            token_ids=tuple(tuple(prompts[row] + responses[row]) for row in rows),
            spans=tuple((len(prompts[row]), lengths[row]) for row in rows),
        )
        for rows in batch_by_length(lengths, token_budget)
    ]


def _rollout(
    planned: PlannedRollout,
    role: str,
    prompt: Sequence[int],
    token_ids: Sequence[int],
    text: str,
    finish_reason: str,
    template_hash: str,
    *,
    sampling: Mapping[str, float],
    seed: int,
    dropped: str | None,
) -> Rollout:
    place = asdict(planned)
    del place["response"], place["messages"]
    return Rollout(
        **place,
        role=role,
        messages=[dict(message) for message in planned.messages],
        response=text,
        prompt_token_ids=list(prompt),
        response_token_ids=list(token_ids),
        finish_reason=finish_reason,
        template_hash=template_hash,
        sampling=json.dumps(sampling, sort_keys=True),
        seed=seed,
        dropped=dropped,
    )


def _reason(prompt_tokens: int, response_tokens: int, max_positions: int | None) -> str | None:
    if response_tokens == 0:
        return "empty response"
    total = prompt_tokens + response_tokens
    if max_positions is not None and total > max_positions:
        return f"{total} tokens exceed the model's context of {max_positions}"
    return None
