"""Which tokens are whose: the assistant turns of a conversation, and their think and answer parts.

Where a response was generated here, its token ids say so. For text, the conversation is rendered and tokenised whole,
and the turns are found in it; where that leaves a doubt it is an error, never a guess.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from jinja2 import TemplateError

from personaspace.extract.chat import ChatFormat, Message
from personaspace.store.errors import InputError, PersonaspaceError
from personaspace.store.rollouts import Span

ROLES = ("system", "user", "assistant")
THINK_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What opens and closes a model's reasoning: of Qwen 3, DeepSeek R1 and others; of Magistral."""
_NOT_AS_WRITTEN = "the rendered conversation does not contain the response as written"


class UnstableBoundaryError(PersonaspaceError):
    """Prompt and response cannot be told apart by tokens; the rollout must not be averaged on a guess."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Core:
    """What a turn thinks or says, without the white space around: characters ``[start, stop)`` of its content."""

    think: bool
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where an assistant turn stands in rendered text: characters ``[start, stop)``."""

    turn: int
    start: int
    stop: int


def locate(chat: ChatFormat, messages: Sequence[Message]) -> Conversation:
    """Tokenise a finished conversation, which ends with an assistant turn.

    Raises UnstableBoundaryError where a turn can't be found in the rendered text, a token straddles its ends, or the
    prompt is another one than the response was given to.
    """
    check_roles(messages)
    if not messages or messages[-1]["role"] != "assistant":
        raise UnstableBoundaryError("the conversation does not end with an assistant turn")
    *before, last = messages
    if not last["content"].strip():
        # Templates differ in what they make of nothing, and nothing is averaged anyway.
        return Conversation(prompt=chat.encode_text(_render(chat, before, asking=True)), response=[], spans=[])
    _check_prompt(chat, before, last)
    text, places = _find_turns(chat, messages, asking=False)
    ids, pieces, wholes = _to_tokens(chat, text, places)
    if not wholes or wholes[-1][0] < sum(message["role"] == "assistant" for message in before):
        raise UnstableBoundaryError("the chat template leaves nothing of the response")
    _, start, stop = wholes[-1]
    if ids[:start] != chat.encode_text("".join(pieces[:start])):
        raise UnstableBoundaryError("the prompt's tokens change once the response follows")
    spans = [span for turn, first, end in wholes for span in _turn_spans(turn, pieces[first:end], first)]
    return Conversation(prompt=ids[:start], response=ids[start:stop], spans=spans)


def continue_conversation(
    chat: ChatFormat, messages: Sequence[Message], prompt: Sequence[int], response: Sequence[int]
) -> Conversation:
    """The conversation whose last turn was generated from ``prompt``, the tokens of ``messages``.

    Raises UnstableBoundaryError where an earlier assistant turn can't be found.
    """
    spans: list[Span] = []
    turns = sum(message["role"] == "assistant" for message in messages)
    if turns:
        text, places = _find_turns(chat, messages, asking=True)
        _, pieces, wholes = _to_tokens(chat, text, places)
        spans = [span for turn, first, end in wholes for span in _turn_spans(turn, pieces[first:end], first)]
    if response:
        asked = chat.render(messages, add_generation_prompt=True).rstrip()
        opened = any(asked.endswith(opening) for opening, _ in THINK_MARKERS)
        pieces = [chat.tokenizer.decode([token]) for token in response]
        spans += _turn_spans(turns, pieces, len(prompt), opened=opened)
    return Conversation(prompt=list(prompt), response=list(response), spans=spans)


def check_roles(messages: Sequence[Message]) -> None:
    """Raise UnstableBoundaryError for a role that chat templates don't know."""
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise UnstableBoundaryError(
                f"message {number} has the role {message['role']!r}; allowed are {', '.join(ROLES)}"
            )


def _render(chat: ChatFormat, messages: Sequence[Message], *, asking: bool) -> str:
    try:
        return chat.render(messages, add_generation_prompt=asking)
    except TemplateError as error:
        raise UnstableBoundaryError(f"the chat template refuses the conversation: {error}") from error


def _check_prompt(chat: ChatFormat, before: Sequence[Message], last: Message) -> None:
    """Raise if what precedes the last question is another once it is answered (Mistral v3 moves the system prompt)."""
    if not before or before[-1]["role"] != "user":
        return
    mark = f"Asked{_unused_word([*before, last])}"
    marked = [*before[:-1], {"role": "user", "content": mark}]
    asked, found, _ = _render(chat, marked, asking=True).partition(mark)
    told, _, _ = _render(chat, [*marked, last], asking=False).partition(mark)
    if not found or asked != told:
        raise UnstableBoundaryError("the chat template renders the prompt differently once a response follows")


def _unused_word(messages: Sequence[Message]) -> str:
    word = "Mark"
    while any(word in message["content"] for message in messages):
        word += "k"
    return word


def _find_turns(chat: ChatFormat, messages: Sequence[Message], *, asking: bool) -> tuple[str, list[_Place]]:
    """The rendered conversation, and where the assistant turns that hold anything stand in it.

    The same conversation is rendered with marks in place of what the assistant says. What lies between the marks is
    the template's, and must be found again around the real content.
    """
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    cores = [_cores(content) for content in contents]
    word = _unused_word(messages)
    marked = [_mark(word, turn, *pair) for turn, pair in enumerate(zip(contents, cores, strict=True))]

    def render(contents: Sequence[str]) -> str:
        said = iter(contents)
        filled = [{**m, "content": next(said)} if m["role"] == "assistant" else m for m in messages]
        return _render(chat, filled, asking=asking)

    text, frame, trimmed = render(contents), render(marked), render([content.strip() for content in marked])
    frame_parts, frame_names = _split(word, frame)
    trimmed_parts, trimmed_names = _split(word, trimmed)
    places: list[_Place] = []
    position = len(frame_parts[0])
    if len(set(frame_names)) < len(frame_names) or frame_names != trimmed_names or not text.startswith(frame_parts[0]):
        raise UnstableBoundaryError(_NOT_AS_WRITTEN)
    for number, (turn, piece) in enumerate(frame_names):
        core = cores[turn][piece]
        before, after = frame_parts[number : number + 2]
        if not text.startswith(contents[turn][core.start : core.stop] + after, position):
            raise UnstableBoundaryError(_NOT_AS_WRITTEN)
        end = position + core.stop - core.start
        if not places or places[-1].turn != turn:
            # White space before the text counts if it is the response's own; reasoning begins with its marker.
            ahead = (core.think and _opening(before)) or _kept(before[::-1], trimmed_parts[number][::-1])
            places.append(_Place(turn=turn, start=position - ahead, stop=end))
        behind = (core.think and _closing(after)) or _kept(after, trimmed_parts[number + 1])
        places[-1] = replace(places[-1], stop=end + behind)
        position = end + len(after)
    # Reasoning may be left out by the template, what was said may not.
    found = {turn for turn, piece in frame_names if not cores[turn][piece].think and piece == len(cores[turn]) - 1}
    if position != len(text) or found != {turn for turn, own in enumerate(cores) if own and not own[-1].think}:
        raise UnstableBoundaryError(_NOT_AS_WRITTEN)
    return text, places


def _cores(content: str) -> list[_Core]:
    """What was thought, if anything, and what was said before and after."""
    ranges = [(False, 0, len(content))]
    for opening, closing in THINK_MARKERS:
        if closing in content:
            end = content.index(closing)
            begin = content.find(opening, 0, end)
            ranges = [(True, 0, end)] if begin < 0 else [(False, 0, begin), (True, begin + len(opening), end)]
            ranges.append((False, end + len(closing), len(content)))
            break
    cores = []
    for think, start, stop in ranges:
        inner = content[start:stop]
        if inner.strip():
            first = start + len(inner) - len(inner.lstrip())
            cores.append(_Core(think=think, start=first, stop=first + len(inner.strip())))
    return cores


def _mark(word: str, turn: int, content: str, cores: Sequence[_Core]) -> str:
    """The content with marks in place of its cores."""
    for piece, core in reversed(list(enumerate(cores))):
        content = f"{content[: core.start]}Turn{turn}Piece{piece}{word}{content[core.stop :]}"
    return content


def _split(word: str, frame: str) -> tuple[list[str], list[tuple[int, int]]]:
    """What lies between the marks of a text, and (turn, piece) of the marks."""
    parts = re.split(rf"Turn(\d+)Piece(\d+){word}", frame)
    return parts[::3], [(int(turn), int(piece)) for turn, piece in zip(parts[1::3], parts[2::3], strict=True)]


def _opening(before: str) -> int:
    """Characters of the text's end that open reasoning; 0 if they don't."""
    ends = [opening for opening, _ in THINK_MARKERS if before.rstrip().endswith(opening)]
    return len(before) - before.rindex(ends[0]) if ends else 0


def _closing(after: str) -> int:
    """Characters of the text's beginning that close reasoning; 0 if they don't."""
    begins = [closing for _, closing in THINK_MARKERS if after.lstrip().startswith(closing)]
    return after.index(begins[0]) + len(begins[0]) if begins else 0


def _kept(text: str, trimmed: str) -> int:
    """White space at the beginning of a text that is not there once the content is trimmed."""
    return max(0, (len(text) - len(text.lstrip())) - (len(trimmed) - len(trimmed.lstrip())))


def _to_tokens(
    chat: ChatFormat, text: str, places: Sequence[_Place]
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


def _turn_spans(turn: int, pieces: Sequence[str], first: int, *, opened: bool = False) -> list[Span]:
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
