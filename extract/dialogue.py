"""Conversations in which each turn of the assistant is sampled: their tokens, as the model reads them at every turn.

A response's own tokens stay in the conversation wherever the chat template writes what was sampled. Some templates
don't: Qwen 3's leaves earlier reasoning out, Llama's trims white space. There the template decides, as it does wherever
the model is used; of the sampled tokens those stay that are still written, and what is left of each turn is recorded.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.generate.engine import Response
from personaspace.extract.spans import Conversation, sampled_spans, to_tokens, turn_spans
from personaspace.extract.turns import find_turns, render
from personaspace.store.rollouts import Span

Fate = Literal["sampled", "part", "rendered", "absent"]
"""What the last prompt holds of an earlier turn: the sampled tokens; those of them that the template still writes; the
same text in other tokens; nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """A conversation that waits for the assistant."""

    messages: tuple[Message, ...]
    """What was said; the user's turn comes last."""
    text: str
    """The same, rendered as a prompt."""
    prompt: tuple[int, ...]
    """Its token ids."""
    spans: tuple[Span, ...] = ()
    """Of the assistant's earlier turns in the prompt."""
    sampled: tuple[tuple[int, ...], ...] = ()
    """Token ids of each of these turns, as sampled."""
    fates: tuple[Fate, ...] = ()
    """What became of each of them in the prompt."""


def open_dialogue(chat: ChatFormat, messages: Sequence[Message]) -> Dialogue:
    """A conversation in which the assistant has not spoken yet."""
    text = chat.render(messages, add_generation_prompt=True)
    return Dialogue(messages=tuple(messages), text=text, prompt=tuple(chat.encode_text(text)))


def go_on(chat: ChatFormat, dialogue: Dialogue, response: Response, user: str) -> Dialogue:
    """The conversation after the assistant's ``response`` and the user's next turn.

    Raises UnstableBoundaryError where an earlier turn can't be found in what the template makes of the conversation.
    """
    sampled = (*dialogue.sampled, tuple(response.token_ids))
    # A template that puts a space before what is said (`plain`) must not put a second one before a sampled space.
    for content in dict.fromkeys((response.text, response.text.strip())):
        messages = (*dialogue.messages, _says("assistant", content), _says("user", user))
        text = render(chat, messages, asking=True)
        rest = _tokens_after(chat, text, dialogue.text + response.text)
        if rest is not None:
            turn, first = len(dialogue.sampled), len(dialogue.prompt)
            return Dialogue(
                messages=messages,
                text=text,
                prompt=(*dialogue.prompt, *response.token_ids, *rest),
                spans=(*dialogue.spans, *_spans(chat, turn, response.token_ids, first, dialogue.text)),
                sampled=sampled,
                fates=(*dialogue.fates, "sampled"),
            )
    messages = (*dialogue.messages, _says("assistant", response.text), _says("user", user))
    return _render_again(chat, messages, sampled)


def end_dialogue(chat: ChatFormat, dialogue: Dialogue, response: Response) -> Conversation:
    """The conversation that ends with ``response``."""
    turn, first = len(dialogue.sampled), len(dialogue.prompt)
    spans = _spans(chat, turn, response.token_ids, first, dialogue.text)
    return Conversation(
        prompt=list(dialogue.prompt), response=list(response.token_ids), spans=[*dialogue.spans, *spans]
    )


def _render_again(chat: ChatFormat, messages: tuple[Message, ...], sampled: tuple[tuple[int, ...], ...]) -> Dialogue:
    """The conversation as the template writes it, with sampled tokens in place of the text that they stand for."""
    text, places = find_turns(chat, messages, asking=True)
    ids, pieces, wholes = to_tokens(chat, text, places)
    prompt: list[int] = []
    spans: list[Span] = []
    fates: list[Fate] = ["absent"] * len(sampled)
    done = 0
    for turn, first, stop in wholes:
        prompt += ids[done:first]
        written = pieces[first:stop]
        own = _tokens_of(chat, sampled[turn], "".join(written))
        if own is None:
            fates[turn] = "rendered"
            spans += turn_spans(turn, written, len(prompt))
        else:
            fates[turn] = "sampled" if len(own) == len(sampled[turn]) else "part"
            spans += turn_spans(turn, [chat.tokenizer.decode([token]) for token in own], len(prompt))
        prompt += ids[first:stop] if own is None else own
        done = stop
    return Dialogue(
        messages=messages,
        text=text,
        prompt=(*prompt, *ids[done:]),
        spans=tuple(spans),
        sampled=sampled,
        fates=tuple(fates),
    )


def _tokens_after(chat: ChatFormat, text: str, said: str) -> list[int] | None:
    """Tokens of ``text`` behind ``said``; None if it does not begin so, or if a token straddles the border."""
    if not text.startswith(said):
        return None
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    first = next((place for place, (begin, _) in enumerate(offsets) if begin >= len(said)), len(ids))
    straddles = first > 0 and offsets[first - 1][1] > len(said)
    return None if straddles or first == len(ids) else ids[first:]


def _tokens_of(chat: ChatFormat, sampled: Sequence[int], written: str) -> Sequence[int] | None:
    """The run of sampled tokens that reads as ``written``; None if there is none."""
    text = chat.decode(sampled)
    if text == written:
        return sampled
    # What a template leaves of a response is its end, as a rule: the answer without the reasoning.
    begin = text.rfind(written)
    if begin < 0:
        return None

    def place(characters: int) -> int:
        return bisect_left(range(len(sampled)), characters, key=lambda count: len(chat.decode(sampled[:count])))

    own = sampled[place(begin) : place(begin + len(written))]
    return own if chat.decode(own) == written else None


def _spans(chat: ChatFormat, turn: int, sampled: Sequence[int], first: int, asked: str) -> list[Span]:
    return sampled_spans(chat, turn, sampled, first, asked) if sampled else []


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}
