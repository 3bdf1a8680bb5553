"""Reading a judge's answer: a number on its scale, or why there is none."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from personaspace.extract.judging.instructions import Scale

LONGEST_REASON = 500
"""Characters kept of what a judge says."""
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_BARE = re.compile(rf"[\s\"'*`]*({_NUMBER})[\s\"'*`.]*")
_NAMED = re.compile(rf"\b(?:score|rating)\b[\"'*`]*\s*(?:[:=]|is)\s*[\"'*`]*({_NUMBER})", re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_REFUSAL = re.compile(r"[\s\"'*`]*refusal[\s\"'*`.]*", re.IGNORECASE)


class MalformedAnswerError(ValueError):
    """A judge's answer that holds no score. The message says why, and is kept."""


def read_answer(text: str, scale: Scale, *, complete: bool = True) -> tuple[float, str | None]:
    """(score of 0 to 3, the judge's reason) of an answer. ``complete``: it was not cut off.

    Reads a JSON object with `score`, a bare number, or one `score: N`. Raises MalformedAnswerError.
    """
    text = _THOUGHT.sub("", text).strip()
    if not text:
        raise MalformedAnswerError("the answer is empty" if complete else "the answer was cut off before a score")
    # A complete object holds its score even if something after it was cut off; a bare "1" may be half of "100".
    objects = [found for found in _objects(text) if "score" in found]
    scores = {_score(found["score"], scale) for found in objects}
    if len(scores) > 1:
        raise MalformedAnswerError(f"the answer holds several scores: {_shorten(text)!r}")
    if scores:
        reason = objects[-1].get("reason")
        return scores.pop(), _shorten(reason) if isinstance(reason, str) else None
    if not complete:
        raise MalformedAnswerError(f"the answer was cut off before a score: {_shorten(text)!r}")
    if scale.top == 100 and _REFUSAL.fullmatch(text):
        return 0.0, "refused"
    if bare := _BARE.fullmatch(text):
        return _score(bare[1], scale), None
    named = set(_NAMED.findall(text))
    if len(named) != 1:
        raise MalformedAnswerError(f"the answer holds {'several scores' if named else 'no score'}: {_shorten(text)!r}")
    return _score(named.pop(), scale), _shorten(text)


def _score(given: object, scale: Scale) -> float:
    try:
        number = math.nan if isinstance(given, bool) else float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= scale.top:
        raise MalformedAnswerError(f"the score {_shorten(str(given))} is not between 0 and {scale.top}")
    if number != int(number):
        raise MalformedAnswerError(f"the score {_shorten(str(given))} is no whole number")
    return scale.score(number)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in a text, first to last."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(found, dict):
                yield found
        start = text.find("{", max(end, start + 1))


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
