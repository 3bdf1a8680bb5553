"""Spans of conversations: the same tokens as when they were generated, or an error, never a guess."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.spans import Conversation, continue_conversation, locate
from personaspace.extract.turns import UnstableBoundaryError
from personaspace.store.errors import InputError
from personaspace.store.rollouts import Span
from tests.models import CHATML, NO_SYSTEM, TRIMMING

ChatWith = Callable[..., ChatFormat]
SYSTEM = {"role": "system", "content": "Be a ghost."}
USER = {"role": "user", "content": "Who are you?"}
MESSAGES = [SYSTEM, USER]
TEXT = st.text(st.sampled_from("abghost  .,?!\n\tÄ✓👻漢"), max_size=30).map(str.strip)


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def own(chat_with: ChatWith, tmp_path: Path, template: str) -> ChatFormat:
    file = tmp_path / "own.jinja"
    file.write_text(template)
    return chat_with(CHATML, chat_template=str(file))


def parts(chat: ChatFormat, conversation: Conversation) -> list[tuple[int, str, str]]:
    """Turn, part and text of all spans."""
    ids = [*conversation.prompt, *conversation.response]
    return [(span.turn, span.part, chat.tokenizer.decode(ids[span.start : span.stop])) for span in conversation.spans]


def said(turn: int, text: str) -> list[tuple[int, str, str]]:
    """Parts of a turn without reasoning."""
    return [(turn, "whole", text), (turn, "answer", text)]


@pytest.mark.parametrize("template", [CHATML, TRIMMING, NO_SYSTEM])
@given(st.lists(TEXT.filter(bool), max_size=2), TEXT.filter(bool))
def test_tokens_of_all_turns(chat_with: ChatWith, template: str, earlier: list[str], response: str) -> None:
    chat = chat_with(template)
    messages = [SYSTEM, *(message for text in earlier for message in (USER, assistant(text))), USER]
    found = locate(chat, [*messages, assistant(response)])
    assert found.prompt == chat.encode_prompt(messages)
    assert found.response == chat.encode_text(response)
    assert parts(chat, found) == [part for turn, text in enumerate([*earlier, response]) for part in said(turn, text)]
    assert continue_conversation(chat, messages, found.prompt, found.response) == found


@pytest.mark.parametrize("response", ["", " \n"])
def test_empty_response_has_no_spans(chat_with: ChatWith, response: str) -> None:
    chat = chat_with(TRIMMING)
    found = locate(chat, [*MESSAGES, assistant(response)])
    assert found == Conversation(prompt=chat.encode_prompt(MESSAGES), response=[], spans=[])


@pytest.mark.parametrize("nothing", ["", " ", "<think>\n</think>"])
def test_empty_turns_before_have_no_spans(chat_with: ChatWith, nothing: str) -> None:
    chat = chat_with()
    messages = [USER, assistant(nothing), USER]
    found = locate(chat, [*messages, assistant("A ghost.")])
    assert found.prompt == chat.encode_prompt(messages)
    assert parts(chat, found) == said(1, "A ghost.")


def test_spaces_that_the_template_trims_are_no_tokens(chat_with: ChatWith) -> None:
    chat = chat_with(TRIMMING)
    written = locate(chat, [*MESSAGES, assistant("  A ghost. \n")])
    assert written == locate(chat, [*MESSAGES, assistant("A ghost.")])


def test_spaces_that_the_template_keeps_are_the_responses(chat_with: ChatWith) -> None:
    chat = chat_with()
    found = locate(chat, [*MESSAGES, assistant("  A ghost. \n")])
    assert parts(chat, found) == said(0, "  A ghost. \n")
    assert found.prompt == chat.encode_prompt(MESSAGES)


def test_other_turns_may_hold_the_response(chat_with: ChatWith) -> None:
    chat = chat_with()
    messages = [{"role": "user", "content": "A ghost."}, assistant("A ghost."), USER]
    found = locate(chat, [*messages, assistant("A ghost.")])
    assert found.prompt == chat.encode_prompt(messages)
    assert parts(chat, found) == said(0, "A ghost.") + said(1, "A ghost.")


def test_texts_may_hold_the_marks_that_turns_are_found_by(chat_with: ChatWith) -> None:
    chat = chat_with()
    user = {"role": "user", "content": "Turn0Piece0Mark Turn0Piece0Markk AskedMark"}
    found = locate(chat, [user, assistant("Turn0Piece0Mark")])
    assert found.prompt == chat.encode_prompt([user])
    assert parts(chat, found) == said(0, "Turn0Piece0Mark")


def test_plain_template_gives_the_tokens_that_generation_gives(chat_with: ChatWith) -> None:
    chat = chat_with(None, chat_template="plain")
    found = locate(chat, [*MESSAGES, assistant("A ghost.")])
    assert found.prompt == chat.encode_prompt(MESSAGES)
    assert found.response == chat.encode_text(" A ghost.")
    assert continue_conversation(chat, MESSAGES, found.prompt, found.response) == found


CONTENTS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(("prompt", "response", "end"), [("Who are y", "ou there", ""), ("Who", " are y", "ou")])
def test_token_that_straddles_a_boundary(
    chat_with: ChatWith, tmp_path: Path, prompt: str, response: str, end: str
) -> None:
    chat = own(chat_with, tmp_path, CONTENTS + "{% if not add_generation_prompt %}{{ '" + end + "' }}{% endif %}")
    assert len(chat.encode_text(" you")) == 1
    with pytest.raises(UnstableBoundaryError, match=r"^a token straddles the boundary between response and template$"):
        locate(chat, [{"role": "user", "content": prompt}, assistant(response)])


def test_earlier_turn_with_a_token_that_straddles_its_boundary(chat_with: ChatWith) -> None:
    # ChatML puts a line break before the response, which merges with one at its beginning.
    chat = chat_with()
    messages = [USER, assistant("\n\nA ghost."), USER]
    straddles = r"^a token straddles the boundary between response and template$"
    with pytest.raises(UnstableBoundaryError, match=straddles):
        locate(chat, [*messages, assistant("A ghost.")])
    with pytest.raises(UnstableBoundaryError, match=straddles):
        continue_conversation(chat, messages, chat.encode_prompt(messages), chat.encode_text("A ghost."))


def test_prompt_whose_tokens_change_once_the_response_follows(chat_with: ChatWith, tmp_path: Path) -> None:
    chat = own(chat_with, tmp_path, CONTENTS)
    # At the end of a text two line breaks are one token, before a letter they are two.
    assert len(chat.encode_text("\n\n")) == 1
    with pytest.raises(UnstableBoundaryError, match=r"^the prompt's tokens change once the response follows$"):
        locate(chat, [{"role": "user", "content": "Who?\n\n"}, assistant("A ghost.")])


def test_prompt_that_opens_the_reasoning_is_read_without_if_the_answer_has_none(
    chat_with: ChatWith, tmp_path: Path
) -> None:
    chat = own(chat_with, tmp_path, CHATML + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    found = locate(chat, [*MESSAGES, assistant("A ghost.")])
    assert found.prompt == chat_with().encode_prompt(MESSAGES)
    assert parts(chat, found) == said(0, "A ghost.")


def test_text_that_the_template_puts_before_the_response_is_the_prompts(chat_with: ChatWith, tmp_path: Path) -> None:
    template = CHATML.replace("message['content']", "(message['role'] == 'assistant') * '<think></think>' + {0}")
    chat = own(chat_with, tmp_path, template.replace("{0}", "message['content']"))
    found = locate(chat, [*MESSAGES, assistant("A ghost.")])
    assert found.prompt == chat_with().encode_prompt(MESSAGES) + chat.encode_text("<think></think>")
    assert parts(chat, found) == said(0, "A ghost.")


NOT_AS_WRITTEN = "the rendered conversation does not contain the response as written"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Mistral 7B v0.3 and Mistral Nemo put the system prompt there.
        (
            "loop.last * 'Now: ' + message['content']",
            "the chat template renders the prompt differently once a response follows",
        ),
        ("message['content'][:20]", NOT_AS_WRITTEN),
        ("(message['content'] | upper if message['role'] == 'assistant' else message['content'])", NOT_AS_WRITTEN),
        ("(message['role'] != 'assistant') * message['content']", NOT_AS_WRITTEN),
        ("message['content'] * (1 + (message['role'] == 'assistant'))", NOT_AS_WRITTEN),
        (
            "(message['content'] if message['role'] != 'assistant' else raise_exception('No answers'))",
            "the chat template refuses the conversation: No answers",
        ),
    ],
)
def test_template_that_changes_what_is_said(chat_with: ChatWith, tmp_path: Path, content: str, message: str) -> None:
    chat = own(chat_with, tmp_path, CHATML.replace("message['content']", content))
    with pytest.raises(UnstableBoundaryError) as error:
        locate(chat, [*MESSAGES, assistant("A ghost who lingers in an old house.")])
    assert str(error.value) == message


THOUGHT = "<think>\nI am old.\n</think>\n\nA ghost."


@pytest.mark.parametrize(
    ("content", "think", "answer"),
    [
        (THOUGHT, "I am old.", "A ghost."),
        ("Well. " + THOUGHT, "I am old.", "A ghost."),
        ("I am old.</think>A ghost.", "I am old.", "A ghost."),
        ("<think>I am old.</think>", "I am old.", None),
        ("<think>I am", "I am", None),
    ],
)
def test_reasoning_is_found_whatever_others_say_of_it(
    chat_with: ChatWith, content: str, think: str, answer: str | None
) -> None:
    chat = chat_with()
    messages = [
        {"role": "system", "content": "Think in <think> tags."},
        {"role": "user", "content": "<think>, then say."},
    ]
    found = locate(chat, [*messages, assistant(content)])
    assert found.prompt == chat.encode_prompt(messages)
    expected = [("whole", content), ("think", think), ("answer", answer)]
    assert [(part, text.strip()) for _, part, text in parts(chat, found)] == [
        (part, text) for part, text in expected if text is not None
    ]
    assert continue_conversation(chat, messages, found.prompt, found.response) == found


@pytest.mark.parametrize("content", ["<think>\n\n</think>", "<think></think>\n\n"])
def test_response_of_an_empty_think_block(chat_with: ChatWith, content: str) -> None:
    with pytest.raises(UnstableBoundaryError, match=r"^the chat template leaves nothing of the response$"):
        locate(chat_with(), [*MESSAGES, assistant(content)])


@pytest.mark.parametrize("special", [True, False])
def test_generated_markers_of_one_token(chat_with: ChatWith, special: bool) -> None:
    chat = chat_with(CHATML + f"{{# {special} #}}")
    assert len(chat.encode_text("<think>")) > 1
    chat.tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    response = chat.encode_text("<think>\n👻 I am old.\n</think>\n\nA ghost 👻")
    assert len(chat.encode_text("<think></think>")) == 2
    prompt = chat.encode_prompt(MESSAGES)
    found = continue_conversation(chat, MESSAGES, prompt, response)
    assert [part for part in parts(chat, found) if part[1] != "whole"] == [
        (0, "think", "👻 I am old."),
        (0, "answer", "A ghost 👻"),
    ]


def test_generated_response_in_a_prompt_that_opens_the_reasoning(chat_with: ChatWith, tmp_path: Path) -> None:
    chat = own(chat_with, tmp_path, CHATML + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    prompt = chat.encode_prompt(MESSAGES)

    def of(text: str) -> list[tuple[int, str, str]]:
        return parts(chat, continue_conversation(chat, MESSAGES, prompt, chat.encode_text(text)))[1:]

    assert of("I am old.\n</think>\n\nA ghost.") == [(0, "think", "I am old."), (0, "answer", "A ghost.")]
    assert of("I am old") == [(0, "think", "I am old")]
    assert of("\n</think>\n\nA ghost.") == [(0, "answer", "A ghost.")]
    assert of("I am old.</think>") == [(0, "think", "I am old.")]
    assert of("</think>") == []


def test_generated_response_that_ends_within_a_character(chat_with: ChatWith) -> None:
    chat = chat_with()
    prompt, response = chat.encode_prompt(MESSAGES), chat.encode_text("A ghost 👻")[:-1]
    found = continue_conversation(chat, MESSAGES, prompt, response)
    whole = Span(turn=0, part="whole", start=len(prompt), stop=len(prompt) + len(response))
    assert found.spans == [whole, replace(whole, part="answer")]


def test_nothing_generated(chat_with: ChatWith) -> None:
    chat = chat_with()
    messages = [USER, assistant("A ghost."), USER]
    found = continue_conversation(chat, messages, chat.encode_prompt(messages), [])
    assert parts(chat, found) == said(0, "A ghost.")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "tool", "content": "x"}, assistant("A ghost.")], "message 0 has the role 'tool'"),
        ([USER, {"role": "Assistant", "content": "A ghost."}], "message 1 has the role 'Assistant'"),
    ],
)
def test_unknown_role(chat_with: ChatWith, messages: list[Message], message: str) -> None:
    with pytest.raises(UnstableBoundaryError) as error:
        locate(chat_with(), messages)
    assert str(error.value) == f"{message}; allowed are system, user, assistant"


def test_content_that_is_no_text(chat_with: ChatWith) -> None:
    pictures: Any = [{"role": "user", "content": [{"type": "image"}]}, assistant("A ghost.")]
    with pytest.raises(UnstableBoundaryError, match=r"^message 0 has content of type list; only text can be used$"):
        locate(chat_with(), pictures)


@pytest.mark.parametrize("messages", [[], [USER], [USER, assistant("A ghost."), USER], [SYSTEM]])
def test_conversation_that_does_not_end_with_the_assistant(chat_with: ChatWith, messages: list[Message]) -> None:
    with pytest.raises(UnstableBoundaryError, match=r"^the conversation does not end with an assistant turn$"):
        locate(chat_with(), messages)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 2), (2, 5)])
def test_span_outside_of_the_conversation(start: int, stop: int) -> None:
    span = Span(turn=0, part="whole", start=start, stop=stop)
    with pytest.raises(InputError) as error:
        Conversation(prompt=[1, 2], response=[3, 4], spans=[span])
    assert str(error.value) == f"{span} is no range of the conversation's 4 tokens"
