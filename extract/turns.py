"""Where the assistant turns of a conversation stand in its rendered text, found without knowing the template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2 import TemplateError

from personaspace.extract.chat import ChatFormat, Message
from personaspace.store.errors import PersonaspaceError

THINK_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What opens and closes a model's reasoning: of Qwen 3, DeepSeek R1 and others; of Magistral."""
_NOT_AS_WRITTEN = "the rendered conversation does not contain the response as written"


class UnstableBoundaryError(PersonaspaceError):
    """Prompt and response cannot be told apart by tokens; the rollout must not be averaged on a guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Core:
    """What a turn thinks or says, without the white space around: characters ``[start, stop)`` of its content."""

    think: bool
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an assistant turn stands in rendered text: characters ``[start, stop)``."""

    turn: int
    start: int
    stop: int


def render(chat: ChatFormat, messages: Sequence[Message], *, asking: bool) -> str:
    """The conversation as text; UnstableBoundaryError if the template refuses it."""
    try:
        return chat.render(messages, add_generation_prompt=asking)
    except TemplateError as error:
        raise UnstableBoundaryError(f"the chat template refuses the conversation: {error}") from error


def check_prompt(chat: ChatFormat, before: Sequence[Message], last: Message) -> None:
    """Raise if what precedes the last question is another once it is answered (Mistral v3 moves the system prompt)."""
    if not before or before[-1]["role"] != "user":
        return
    mark = f"Asked{_unused_word([*before, last])}"
    marked = [*before[:-1], {"role": "user", "content": mark}]
    asked, found, _ = render(chat, marked, asking=True).partition(mark)
    told, _, _ = render(chat, [*marked, last], asking=False).partition(mark)
    if not found or asked != told:
        raise UnstableBoundaryError("the chat template renders the prompt differently once a response follows")


def find_turns(chat: ChatFormat, messages: Sequence[Message], *, asking: bool) -> tuple[str, list[Place]]:
    """The rendered conversation, and where the assistant turns that hold anything stand in it.

    The same conversation is rendered with marks in place of what the assistant says. What lies between the marks is
    the template's, and must be found again around the real content.
    """
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    cores = [_cores(content) for content in contents]
    word = _unused_word(messages)
    marked = [_mark(word, turn, *pair) for turn, pair in enumerate(zip(contents, cores, strict=True))]

    def fill(contents: Sequence[str]) -> str:
        said = iter(contents)
        filled = [{**m, "content": next(said)} if m["role"] == "assistant" else m for m in messages]
        return render(chat, filled, asking=asking)

    text, frame, trimmed = fill(contents), fill(marked), fill([content.strip() for content in marked])
    frame_parts, frame_names = _split(word, frame)
    trimmed_parts, trimmed_names = _split(word, trimmed)
    places: list[Place] = []
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
            places.append(Place(turn=turn, start=position - ahead, stop=end))
        behind = (core.think and _closing(after)) or _kept(after, trimmed_parts[number + 1])
        places[-1] = replace(places[-1], stop=end + behind)
        position = end + len(after)
    # Reasoning may be left out by the template, what was said may not.
    found = {turn for turn, piece in frame_names if not cores[turn][piece].think and piece == len(cores[turn]) - 1}
    if position != len(text) or found != {turn for turn, own in enumerate(cores) if own and not own[-1].think}:
        raise UnstableBoundaryError(_NOT_AS_WRITTEN)
    return text, places


def _unused_word(messages: Sequence[Message]) -> str:
    word = "Mark"
    while any(word in message["content"] for message in messages):
        word += "k"
    return word


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
