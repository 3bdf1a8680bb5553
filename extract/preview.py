"""What is averaged, token by token: the data behind `personaspace preview`."""

from collections.abc import Sequence
from dataclasses import dataclass

from personaspace.extract.chat import ChatFormat
from personaspace.extract.reductions import Readout
from personaspace.store.rollouts import Span

_CONTEXT = 4
"""Tokens decoded before the one wanted: what a token reads as may depend on its neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """One average over tokens of a rollout."""

    name: str
    """Reduction, or turn and part, such as `mean` or `turn 1 think`."""
    start: int
    stop: int
    """Tokens ``[start, stop)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownToken:
    """A token as people read it."""

    text: str
    averages: tuple[str, ...]
    """Names of the averages that it is part of."""


def list_averages(readout: Readout, spans: Sequence[Span]) -> list[Average]:
    """The averages that are taken of a rollout with these spans, in the order in which they are stored."""
    rows = [f"turn {span.turn}" + ("" if span.part == "whole" else f" {span.part}") for span in readout.spans(spans)]
    names = [*readout.reductions, *rows]
    return [
        Average(name=name, start=start, stop=stop)
        for name, (start, stop) in zip(names, readout.segments(spans), strict=True)
    ]


def show_tokens(chat: ChatFormat, token_ids: Sequence[int], averages: Sequence[Average]) -> list[ShownToken]:
    """Every token's text, and what it is averaged into. A character of several tokens is shown with its last one."""
    shown = []
    known = ""
    start = 0
    for place in range(len(token_ids)):
        if place - start > _CONTEXT and known:
            start, known = place - _CONTEXT, chat.tokenizer.decode(list(token_ids[place - _CONTEXT : place]))
        text = chat.tokenizer.decode(list(token_ids[start : place + 1]))
        ends_inside = text.endswith("\N{REPLACEMENT CHARACTER}") and place + 1 < len(token_ids)
        shown.append(
            ShownToken(
                text="" if ends_inside else text[len(known) :],
                averages=tuple(a.name for a in averages if a.start <= place < a.stop),
            )
        )
        known = known if ends_inside else text
    return shown
