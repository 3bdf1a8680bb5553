"""Where a response ends: before its end-of-turn token, or before a stop string. The same rule for every engine."""

from collections.abc import Sequence

from transformers import GenerationConfig

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.generate.engine import FinishReason, Response


def stop_ids(*candidates: int | list[int] | None) -> list[int]:
    """End-of-turn ids from a generation config and a tokenizer, in order, without doubles."""
    found: dict[int, None] = {}
    for candidate in candidates:
        for token in [candidate] if isinstance(candidate, int) else candidate or []:
            found[token] = None
    return list(found)


def checkpoint_stop_ids(checkpoint: Checkpoint, chat: ChatFormat) -> list[int]:
    """End-of-turn ids of a model that some other program runs: those that transformers would give it."""
    try:
        generation = GenerationConfig.from_pretrained(checkpoint.source, revision=checkpoint.revision)
    except OSError:  # It has none; transformers then makes one from the model's config.
        generation = GenerationConfig.from_model_config(checkpoint.config())
    return stop_ids(generation.eos_token_id, chat.tokenizer.eos_token_id)


def end_response(chat: ChatFormat, stops: Sequence[int], token_ids: Sequence[int]) -> Response:
    """The response in sampled tokens, cut at the first of ``stops`` (token ids) or stop string."""
    end = next((place for place, token in enumerate(token_ids) if token in stops), len(token_ids))
    finish_reason: FinishReason = "stop" if end < len(token_ids) else "length"
    kept = list(token_ids[:end])
    for stop in chat.stop_strings:
        cut = chat.decode(kept).find(stop)
        if cut >= 0:
            finish_reason = "stop"
            # A token that holds even a part of the stop string belongs to the next turn.
            while len(chat.decode(kept)) > cut:
                kept.pop()
    return Response(token_ids=kept, text=chat.decode(kept), finish_reason=finish_reason)
