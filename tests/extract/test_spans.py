"""Spans of finished responses: the same tokens as when they were generated, or an error, never a guess."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.chat import ChatFormat
from personaspace.extract.spans import UnstableBoundaryError, locate_response
from tests.models import CHATML, NO_SYSTEM, TRIMMING

ChatWith = Callable[..., ChatFormat]
MESSAGES = [{"role": "system", "content": "Be a ghost."}, {"role": "user", "content": "Who are you?"}]
TEXT = st.text(st.sampled_from("abghost  .,?!\n\tÄ✓👻漢"), max_size=30)


@pytest.mark.parametrize("template", [CHATML, TRIMMING, NO_SYSTEM])
@given(TEXT)
def test_prompt_and_response_tokens(chat_with: ChatWith, template: str, text: str) -> None:
    chat = chat_with(template)
    response = text.strip()
    prompt_ids, response_ids = locate_response(chat, MESSAGES, response)
    assert prompt_ids == chat.encode_prompt(MESSAGES)
    assert response_ids == chat.encode_text(response)


@pytest.mark.parametrize("response", ["", " \n"])
def test_empty_response_is_an_empty_span(chat_with: ChatWith, response: str) -> None:
    assert locate_response(chat_with(TRIMMING), MESSAGES, response)[1] == []


def test_spaces_that_the_template_trims_are_no_tokens(chat_with: ChatWith) -> None:
    chat = chat_with(TRIMMING)
    assert locate_response(chat, MESSAGES, "  A ghost. \n") == locate_response(chat, MESSAGES, "A ghost.")


def test_earlier_turns_may_hold_the_response(chat_with: ChatWith) -> None:
    chat = chat_with()
    answer = {"role": "assistant", "content": "A ghost."}
    prompt_ids, response_ids = locate_response(chat, [*MESSAGES, answer, MESSAGES[1]], "A ghost.")
    assert prompt_ids == chat.encode_prompt([*MESSAGES, answer, MESSAGES[1]])
    assert response_ids == chat.encode_text("A ghost.")


def test_plain_template_gives_the_tokens_that_generation_gives(chat_with: ChatWith) -> None:
    chat = chat_with(None, chat_template="plain")
    prompt_ids, response_ids = locate_response(chat, MESSAGES, "A ghost.")
    assert prompt_ids == chat.encode_prompt(MESSAGES)
    assert response_ids == chat.encode_text(" A ghost.")


def own(chat_with: ChatWith, tmp_path: Path, template: str) -> ChatFormat:
    file = tmp_path / "own.jinja"
    file.write_text(template)
    return chat_with(CHATML, chat_template=str(file))


CONTENTS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize(("prompt", "response", "end"), [("Who are y", "ou there", ""), ("Who", " are y", "ou")])
def test_token_that_straddles_a_boundary(
    chat_with: ChatWith, tmp_path: Path, prompt: str, response: str, end: str
) -> None:
    chat = own(chat_with, tmp_path, CONTENTS + "{% if not add_generation_prompt %}{{ '" + end + "' }}{% endif %}")
    assert len(chat.encode_text(" you")) == 1
    messages = [{"role": "user", "content": prompt}]
    with pytest.raises(UnstableBoundaryError, match="a token straddles the boundary between response and template"):
        locate_response(chat, messages, response)


def test_prompt_whose_tokens_change_once_the_response_follows(chat_with: ChatWith, tmp_path: Path) -> None:
    chat = own(chat_with, tmp_path, CONTENTS)
    # At the end of a text two line breaks are one token, before a letter they are two.
    messages = [{"role": "user", "content": "Who?\n\n"}]
    assert len(chat.encode_text("\n\n")) == 1
    with pytest.raises(UnstableBoundaryError, match="the prompt's tokens change once the response follows"):
        locate_response(chat, messages, "A ghost.")


def test_prompt_that_is_rendered_differently_once_a_response_follows(chat_with: ChatWith, tmp_path: Path) -> None:
    chat = own(chat_with, tmp_path, CHATML + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    with pytest.raises(UnstableBoundaryError, match="renders the prompt differently once a response follows"):
        locate_response(chat, MESSAGES, "A ghost.")


def test_text_that_the_template_puts_before_the_response(chat_with: ChatWith, tmp_path: Path) -> None:
    template = CHATML.replace("message['content']", "(message['role'] == 'assistant') * '<think></think>' + {0}")
    chat = own(chat_with, tmp_path, template.replace("{0}", "message['content']"))
    with pytest.raises(UnstableBoundaryError, match="does not contain the response as written"):
        locate_response(chat, MESSAGES, "A ghost.")
