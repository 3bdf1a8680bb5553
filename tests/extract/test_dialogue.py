"""Sampled conversations: the tokens of every turn stay as they were sampled, or what became of them is said."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.chat import ChatFormat
from personaspace.extract.dialogue import Dialogue, end_dialogue, go_on, open_dialogue
from personaspace.extract.generate.engine import Response
from personaspace.extract.turns import UnstableBoundaryError
from personaspace.store.rollouts import Span
from tests.extract.real_templates import FAMILIES, real_chat
from tests.models import CHATML, TRIMMING

ChatWith = Callable[..., ChatFormat]
OPENING = ({"role": "user", "content": "Who are you?"},)
ANSWERS = ("A ghost. Who asks?", "The sea is wide,\n\nthe night is long.", "Où sont les étoiles 🌌?")
QUESTIONS = ("And then?", "What do you see?", "Stay a while.")
OPENED = "Who asks?\n</think>\n\n"
"""Reasoning that the prompt has opened."""


def letter_by_letter(chat: ChatFormat, text: str) -> Response:
    """A response whose tokens are not those that its text is encoded with, as sampled ones need not be."""
    ids = [token for letter in text for token in chat.encode_text(letter)]
    assert len(text) == 1 or ids != chat.encode_text(text)
    return Response(token_ids=ids, text=chat.decode(ids), finish_reason="stop")


def talk(chat: ChatFormat, responses: Sequence[Response]) -> tuple[Dialogue, list[Span]]:
    """The dialogue before its last response, and the spans with it."""
    dialogue = open_dialogue(chat, OPENING)
    for response, question in zip(responses, QUESTIONS, strict=False):
        if response is not responses[-1]:
            dialogue = go_on(chat, dialogue, response, question)
    return dialogue, end_dialogue(chat, dialogue, responses[-1]).spans


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("deepseek-r1", "gpt-oss")])
def test_real_templates_keep_the_sampled_tokens(name: str, tmp_path: Path) -> None:
    chat = real_chat(FAMILIES[name], tmp_path)
    # Where the space is no part of the prompt, the model samples it.
    space = " " if FAMILIES[name].header.endswith(" ") else ""
    responses = [letter_by_letter(chat, space + text) for text in ANSWERS]
    dialogue, spans = talk(chat, responses)
    assert dialogue.fates == ("sampled", "sampled")
    conversation = [*dialogue.prompt, *responses[-1].token_ids]
    wholes = [span for span in spans if span.part == "whole"]
    assert [conversation[span.start : span.stop] for span in wholes] == [one.token_ids for one in responses]
    assert [span.turn for span in wholes] == [0, 1, 2]
    assert chat.tokenizer.decode(list(dialogue.prompt)) == chat.tokenizer.decode(chat.encode_text(dialogue.text))
    assert dialogue.text == chat.render(dialogue.messages, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "reasoning"),
    [("qwen-3", "<think>\nWho asks?\n</think>\n\n"), ("qwen-3-thinking", OPENED), ("deepseek-r1", OPENED)],
)
def test_dropped_reasoning_leaves_the_sampled_answer(name: str, reasoning: str, tmp_path: Path) -> None:
    """These leave the reasoning of earlier turns out: of the tokens those of the answers remain."""
    chat = real_chat(FAMILIES[name], tmp_path)
    thought = [letter_by_letter(chat, reasoning + text) for text in ANSWERS]
    dialogue, spans = talk(chat, thought)
    assert dialogue.fates == ("part", "part")
    assert "Who asks?\n" not in dialogue.text
    said = [message["content"] for message in dialogue.messages if message["role"] == "assistant"]
    assert said == [reasoning + text for text in ANSWERS[:2]]
    conversation = [*dialogue.prompt, *thought[-1].token_ids]
    answers = [conversation[span.start : span.stop] for span in spans if span.part == "answer"]
    assert answers == [letter_by_letter(chat, text).token_ids for text in ANSWERS]
    assert [span.turn for span in spans if span.part == "think"] == [2]
    wholes = [span for span in spans if span.part == "whole"]
    assert [span.stop - span.start for span in wholes[:2]] == [len(ids) for ids in answers[:2]]


def test_a_thinking_mode_that_is_off_leaves_the_tokens_alone(tmp_path: Path) -> None:
    """Qwen 3 opens the last turn with an empty block then, and earlier ones not: the answers' tokens stay."""
    chat = real_chat(FAMILIES["qwen-3"], tmp_path, thinking=False)
    dialogue, spans = talk(chat, [letter_by_letter(chat, text) for text in ANSWERS])
    assert dialogue.fates == ("sampled", "sampled")
    assert dialogue.text.count("<think>\n\n</think>") == 1
    assert [span.turn for span in spans if span.part == "whole"] == [0, 1, 2]


def test_trimmed_white_space_costs_only_its_tokens(chat_with: ChatWith) -> None:
    chat = chat_with(TRIMMING)
    padded = letter_by_letter(chat, "  A ghost.\n\n")
    dialogue = go_on(chat, open_dialogue(chat, OPENING), padded, "And then?")
    assert dialogue.fates == ("part",)
    [whole] = [span for span in dialogue.spans if span.part == "whole"]
    assert list(dialogue.prompt[whole.start : whole.stop]) == letter_by_letter(chat, "A ghost.").token_ids


def test_where_a_sampled_token_holds_more_than_is_written_the_text_is_encoded_anew(chat_with: ChatWith) -> None:
    chat = chat_with(TRIMMING)
    [token] = chat.encode_text(".\n\n")[-1:]
    ids = [*chat.encode_text("A ghost"), *chat.encode_text(" the")]
    spaced = Response(token_ids=ids[-1:], text=chat.decode(ids[-1:]), finish_reason="stop")
    assert spaced.text == " the", token
    dialogue = go_on(chat, open_dialogue(chat, OPENING), spaced, "And then?")
    assert dialogue.fates == ("rendered",)
    [whole] = [span for span in dialogue.spans if span.part == "whole"]
    assert chat.decode(dialogue.prompt[whole.start : whole.stop]) == "the"


def test_plain_conversations_have_one_space_before_each_answer(chat_with: ChatWith) -> None:
    chat = chat_with(None, chat_template="plain")
    dialogue = open_dialogue(chat, OPENING)
    for answer in (" A ghost.", " The sea."):
        response = Response(token_ids=chat.encode_text(answer), text=answer, finish_reason="stop")
        dialogue = go_on(chat, dialogue, response, "And then?")
    assert dialogue.text == (
        "User: Who are you?\nAssistant: A ghost.\nUser: And then?\nAssistant: The sea.\nUser: And then?\nAssistant:"
    )
    assert dialogue.fates == ("sampled", "sampled")
    assert list(dialogue.prompt) == chat.encode_text(dialogue.text)


@pytest.fixture(scope="module")
def chatml(chat_with: ChatWith) -> ChatFormat:
    return chat_with(CHATML)


@given(st.lists(st.lists(st.integers(0, 399), max_size=12), min_size=1, max_size=6))
def test_any_tokens_stay_where_they_were_sampled(chatml: ChatFormat, turns: list[list[int]]) -> None:
    """Whatever is sampled (nothing, half characters, special tokens): each prompt continues the one before it."""
    dialogue = open_dialogue(chatml, OPENING)
    expected = []
    for number, ids in enumerate(turns):
        response = Response(token_ids=ids, text=chatml.decode(ids), finish_reason="length")
        expected += [Span(turn=number, part="whole", start=len(dialogue.prompt), stop=len(dialogue.prompt) + len(ids))]
        if number == len(turns) - 1:
            break
        after = go_on(chatml, dialogue, response, "And then?")
        said = (*dialogue.prompt, *ids)
        assert after.prompt[: len(said)] == said
        assert after.prompt[len(said) :] == tuple(
            chatml.encode_text(
                "<|im_end|>\n" + chatml.render([{"role": "user", "content": "And then?"}], add_generation_prompt=True)
            )
        )
        dialogue = after
    conversation = end_dialogue(chatml, dialogue, response)
    assert [span for span in conversation.spans if span.part == "whole"] == [
        span for span in expected if span.stop > span.start
    ]
    assert dialogue.fates == ("sampled",) * (len(turns) - 1)


def test_a_template_that_changes_what_was_said_is_refused(chat_with: ChatWith) -> None:
    chat = chat_with(CHATML.replace("message['content'] +", "message['content'] | upper +"))
    dialogue = open_dialogue(chat, OPENING)
    with pytest.raises(UnstableBoundaryError, match="conversation does not contain the response as written"):
        go_on(chat, dialogue, letter_by_letter(chat, "A ghost."), "And then?")
