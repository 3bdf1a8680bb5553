"""Which tokens are whose: the assistant turns of a conversation, and their think and answer parts.

Where a response was generated here, its token ids say so. For text, the conversation is rendered and tokenised whole,
and the turns are found in it; where that leaves a doubt it is an error, never a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.turns import (
    THINK_MARKERS,
    Place,
    UnstableBoundaryError,
    check_prompt,
    find_turns,
    render,
)
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A conversation as tokens, and its assistant turns."""

    prompt: list[int]
    """Token ids up to where the last assistant turn begins."""
    response: list[int]
    """Token ids of the last assistant turn, without the end-of-turn token."""
    spans: list[Span]
    """Of all assistant turns that hold anything, in order."""

    def __post_init__(self) -> None:
        total = len(self.prompt) + len(self.response)
        for span in self.spans:
            if not 0 <= span.start < span.stop <= total:
                raise InputError(f"{span} is no range of the conversation's {total} tokens")


def locate(chat: ChatFormat, messages: Sequence[Message]) -> Conversation:
    """Tokenise a finished conversation, which ends with an assistant turn.

    Raises UnstableBoundaryError where a turn can't be found in the rendered text, a token straddles its ends, or the
    prompt is another one than the response was given to.
    """
    _check_messages(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise UnstableBoundaryError("the conversation does not end with an assistant turn")
    *before, last = messages
    if not last["content"].strip():
        # Templates differ in what they make of nothing, and nothing is averaged anyway.
        return Conversation(prompt=chat.encode_text(render(chat, before, asking=True)), response=[], spans=[])
    check_prompt(chat, before, last)
    text, places = find_turns(chat, messages, asking=False)
    ids, pieces, wholes = to_tokens(chat, text, places)
    if not wholes or wholes[-1][0] < sum(message["role"] == "assistant" for message in before):
        raise UnstableBoundaryError("the chat template leaves nothing of the response")
    _, start, stop = wholes[-1]
    if ids[:start] != chat.encode_text("".join(pieces[:start])):
        raise UnstableBoundaryError("the prompt's tokens change once the response follows")
    return Conversation(prompt=ids[:start], response=ids[start:stop], spans=_spans(pieces, wholes))


def continue_conversation(
    chat: ChatFormat, messages: Sequence[Message], prompt: Sequence[int], response: Sequence[int]
) -> Conversation:
    """The conversation whose last turn was generated from ``prompt``, the tokens of ``messages``.

    Raises UnstableBoundaryError where an earlier assistant turn can't be found.
    """
    spans: list[Span] = []
    turns = sum(message["role"] == "assistant" for message in messages)
    if turns:
        text, places = find_turns(chat, messages, asking=True)
        _, pieces, wholes = to_tokens(chat, text, places)
        spans = _spans(pieces, wholes)
    if response:
        asked = chat.render(messages, add_generation_prompt=True)
        spans += sampled_spans(chat, turns, response, len(prompt), asked)
    return Conversation(prompt=list(prompt), response=list(response), spans=spans)


def sampled_spans(chat: ChatFormat, turn: int, sampled: Sequence[int], first: int, asked: str) -> list[Span]:
    """Spans of one turn of sampled tokens, from number ``first`` on, that follow the rendered prompt ``asked``."""
    opened = any(asked.rstrip().endswith(opening) for opening, _ in THINK_MARKERS)
    return turn_spans(turn, [chat.tokenizer.decode([token]) for token in sampled], first, opened=opened)


def _check_messages(messages: Sequence[Message]) -> None:
    """Raise UnstableBoundaryError for a role that chat templates don't know, and for content that is no text."""
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise UnstableBoundaryError(
                f"message {number} has the role {message['role']!r}; allowed are {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise UnstableBoundaryError(
                f"message {number} has content of type {type(message['content']).__name__}; only text can be used"
            )


def to_tokens(
    chat: ChatFormat, text: str, places: Sequence[Place]
) -> tuple[list[int], list[str], list[tuple[int, int, int]]]:
    """Token ids of the text, the characters that each token adds, and (turn, first, stop) of each place."""
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    wholes = []
    for place in places:
        first = next((i for i, (_, end) in enumerate(offsets) if end > place.start), len(ids))
        stop = next((i for i, (begin, _) in enumerate(offsets) if begin >= place.stop), len(ids))
        begins, ends = offsets[first][0], offsets[stop - 1][1]
        # A space before the text belongs to its first token, just as in a generated response.
        if not (begins == place.start or text[begins : place.start] == " ") or ends > place.stop:
            raise UnstableBoundaryError("a token straddles the boundary between response and template")
        wholes.append((place.turn, first, stop))
    ends = [end for _, end in offsets]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return ids, pieces, wholes


def _spans(pieces: Sequence[str], wholes: Sequence[tuple[int, int, int]]) -> list[Span]:
    """Spans of all turns, given as (turn, first token, end)."""
    return [span for turn, first, end in wholes for span in turn_spans(turn, pieces[first:end], first)]


def turn_spans(turn: int, pieces: Sequence[str], first: int, *, opened: bool = False) -> list[Span]:
    """Spans of one turn whose tokens, from number ``first`` on, read as ``pieces``.

    ``opened``: the prompt has opened the reasoning already. Tokens of markers and white space beside them belong to
    neither part; an answer without any reasoning is the whole turn.
    """
    whole = Span(turn=turn, part="whole", start=first, stop=first + len(pieces))
    text = "".join(pieces)
    opening, closing = next((pair for pair in THINK_MARKERS if any(mark in text for mark in pair)), THINK_MARKERS[0])
    begin = 0 if opened else text.find(opening)
    end = text.find(closing)
    if end >= 0:
        think = (max(begin, 0), end)
        answer = (end + len(closing), len(text))
    elif begin >= 0:
        think, answer = (begin, len(text)), (len(text), len(text))
    else:
        return [whole, replace(whole, part="answer")]
    if opening in text[think[0] : think[1]]:
        think = (text.index(opening, think[0]) + len(opening), think[1])
    spans = [whole]
    for part, (start, stop) in (("think", think), ("answer", answer)):
        inside = _tokens_inside(pieces, start, stop)
        if inside:
            spans.append(Span(turn=turn, part=part, start=first + inside.start, stop=first + inside.stop))
    return spans


def _tokens_inside(pieces: Sequence[str], start: int, stop: int) -> range:
    """Tokens that lie in characters ``[start, stop)``, from the first to the last one that holds any text."""
    ends = list(accumulate(len(piece) for piece in pieces))
    inside = [
        number
        for number, (piece, end) in enumerate(zip(pieces, ends, strict=True))
        if piece.strip() and start <= end - len(piece) and end <= stop
    ]
    if not inside:
        return range(0)
    last = inside[-1]
    # A character of several bytes may take several tokens, of which the first one holds it.
    while last + 1 < len(pieces) and not pieces[last + 1]:
        last += 1
    return range(inside[0], last + 1)
