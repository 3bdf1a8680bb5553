"""Real chat templates: spans hold just the tokens of what the assistant said, or an error says why there are none."""

from collections.abc import Callable
from datetime import datetime
from functools import cache
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from personaspace.extract.chat import ChatFormat, Message
from personaspace.extract.spans import Conversation, continue_conversation, locate
from personaspace.extract.turns import UnstableBoundaryError
from tests.extract.real_templates import FAMILIES, real_chat

ChatOf = Callable[..., ChatFormat]
SYSTEM = {"role": "system", "content": "Be a phantom."}
USER = {"role": "user", "content": "Who are you?"}
STRADDLES = "a token straddles the boundary between response and template"
CONTENTS = {
    "plain": "A ghost.",
    "spaces": "  A ghost.  ",
    "line break behind": "A ghost.\n",
    "line break ahead": "\nA ghost.",
    "two line breaks ahead": "\n\nA ghost.",
    "emoji": "👻 幽霊です ✓ Ä",
    "composed and not": "Café or Cafe\u0301, gho\u0302st\u0302",
    "markdown": "# Ghost\n\n```python\nprint('boo')\n```\n\n- one\n- two",
    "template": "Say <|im_end|>, <|eot_id|> or [/INST]assistant\n<end_of_turn> user: </s>",
    "mark": "Turn0Piece0Mark",
}
ADDED = {
    "qwen-3": "<think>\n\n</think>\n\n",
    "qwen-3-thinking": "\n</think>\n\n",
    "gpt-oss": "<|channel|>final<|message|>",
}
"""What stands between the prompt of generation and the answer, once there is one."""
REWRITES = ("qwen-3", "qwen-3-thinking")
"""They take the last turn's reasoning out, and write it again in their own way, even if there is none."""
SAYS_SYSTEM_LAST = "mistral-0.3"
"""Its template writes the system prompt into the last message, and only if that is the user's."""
THOUGHT = "<think>\nI am old.\n</think>\n\nA ghost."
UNTHOUGHT = "<think>\n\n</think>\n\nA ghost."
CUT = "<think>\nI am o"
UNOPENED = "I am old.\n</think>\n\nA ghost."
UNSAID = "<think>\nI am old.\n</think>"
AFTER = "Well. <think>\nI am old.\n</think>\n\nA ghost."


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="session")
def chat_of(tmp_path_factory: pytest.TempPathFactory) -> ChatOf:
    """``chat_of(family, **config)``, built once."""

    @cache
    def build(name: str, **config: str | bool) -> ChatFormat:
        return real_chat(FAMILIES[name], tmp_path_factory.mktemp(name), **config)

    return build


def texts(chat: ChatFormat, conversation: Conversation) -> list[tuple[int, str, str]]:
    """Turn, part and text of all spans, without white space around."""
    ids = [*conversation.prompt, *conversation.response]
    return [(s.turn, s.part, chat.tokenizer.decode(ids[s.start : s.stop]).strip()) for s in conversation.spans]


def expected_text(name: str, content: str, *, last: bool) -> str:
    content = normalize("NFC", content) if FAMILIES[name].composes else content
    if FAMILIES[name].strips:
        return content.strip()
    return content.lstrip("\n") if last and name in REWRITES else content


def expected_prompt(name: str, chat: ChatFormat, before: list[Message]) -> str:
    asked = chat.render(before, add_generation_prompt=True)
    return asked.removesuffix("<think>\n") if name == "deepseek-r1" else asked + ADDED.get(name, "")


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_turns(chat_of: ChatOf, name: str, content: str) -> None:
    said = assistant(content)
    for messages in ([USER, said], [SYSTEM, USER, said], [USER, said, USER, assistant("Two."), USER, said]):
        check_turns(name, chat_of(name), messages)


def check_turns(name: str, chat: ChatFormat, messages: list[Message]) -> None:
    family, decode = FAMILIES[name], chat.tokenizer.decode
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    expected = [expected_text(name, text, last=turn == len(contents) - 1) for turn, text in enumerate(contents)]
    refusal = None
    if name == SAYS_SYSTEM_LAST and SYSTEM in messages:
        refusal = "the chat template renders the prompt differently once a response follows"
    elif family.header.endswith("\n") and any(text.startswith("\n") for text in expected):
        refusal = STRADDLES
    if refusal is not None:
        with pytest.raises(UnstableBoundaryError, match=f"^{refusal}$"):
            locate(chat, messages)
        return
    conversation = locate(chat, messages)
    ids = [*conversation.prompt, *conversation.response]
    rendered = chat.encode_text(chat.render(messages, add_generation_prompt=False))
    assert rendered[: len(ids)] == ids
    assert decode([rendered[len(ids)]]) == family.end
    wholes = [span for span in conversation.spans if span.part == "whole"]
    assert [span.turn for span in wholes] == list(range(len(contents)))
    assert [span.part for span in conversation.spans] == ["whole", "answer"] * len(contents)
    for span, text in zip(wholes, expected, strict=True):
        # Where the template puts a space, the first token may hold it.
        assert decode(ids[span.start : span.stop]).removeprefix(" ") == text.removeprefix(" ")
        rethought = "<think>\n\n</think>\n\n" if span is wholes[-1] and name in REWRITES else ""
        assert decode(ids[: span.stop]).endswith(family.header + rethought + text)
    prompt = expected_prompt(name, chat, messages[:-1])
    if family.header.endswith(" "):
        assert decode(conversation.prompt).removesuffix(" ") == prompt
    else:
        assert conversation.prompt == chat.encode_text(prompt)
    assert (SYSTEM["content"] in prompt) == (SYSTEM in messages)


@pytest.mark.parametrize("content", ["", " ", " \n\t\n"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_no_span(chat_of: ChatOf, name: str, content: str) -> None:
    chat = chat_of(name)
    found = locate(chat, [SYSTEM, USER, assistant(content)])
    assert found == Conversation(prompt=chat.encode_prompt([SYSTEM, USER]), response=[], spans=[])


KEPT = {
    THOUGHT: (THOUGHT, "I am old.", "A ghost."),
    UNTHOUGHT: ("A ghost.", None, "A ghost."),
    CUT: (CUT, "I am o", None),
    UNOPENED: (UNOPENED, "I am old.", "A ghost."),
    UNSAID: (UNSAID, "I am old.", None),
    AFTER: (AFTER, "I am old.", "A ghost."),
}
"""Content -> the whole turn, and its think and answer parts, where the template writes all that it is given."""
REWRITTEN = {**KEPT, UNOPENED: (THOUGHT, "I am old.", "A ghost."), AFTER: (THOUGHT, "I am old.", "A ghost.")}
"""The same where it takes the reasoning out, and writes it again in its own way."""
DROPPED = {CUT: KEPT[CUT], UNSAID: None} | dict.fromkeys(
    (THOUGHT, UNTHOUGHT, UNOPENED, AFTER), ("A ghost.", None, "A ghost.")
)
"""The same where it leaves the reasoning out."""


@pytest.mark.parametrize("content", KEPT, ids=["thought", "unthought", "cut", "unopened", "unsaid", "after"])
@pytest.mark.parametrize("name", FAMILIES)
def test_think_and_answer(chat_of: ChatOf, name: str, content: str) -> None:
    chat = chat_of(name)
    outcomes = (REWRITTEN if name in REWRITES else DROPPED if name == "deepseek-r1" else KEPT)[content]
    if outcomes is None:
        with pytest.raises(UnstableBoundaryError, match=r"^the chat template leaves nothing of the response$"):
            locate(chat, [USER, assistant(content)])
        return
    found = locate(chat, [USER, assistant(content)])
    parts = zip(("whole", "think", "answer"), outcomes, strict=True)
    assert texts(chat, found) == [(0, part, text) for part, text in parts if text is not None]
    if content == UNTHOUGHT and name != "deepseek-r1":
        assert chat.tokenizer.decode(found.prompt).endswith("<think>\n\n</think>\n\n")


def test_reasoning_of_earlier_turns(chat_of: ChatOf) -> None:
    messages = [USER, assistant(THOUGHT), USER, assistant(THOUGHT)]
    said = [(0, "whole", "A ghost."), (0, "answer", "A ghost.")]
    thought = [(0, "whole", THOUGHT), (0, "think", "I am old."), (0, "answer", "A ghost.")]
    last = [(1, *rest) for _, *rest in thought]
    for name, expected in {
        "chatml": thought + last,
        "qwen-3": said + last,
        "deepseek-r1": [*said, *((1, *rest) for _, *rest in said)],
    }.items():
        assert texts(chat_of(name), locate(chat_of(name), messages)) == expected


def test_magistral_markers(chat_of: ChatOf) -> None:
    content = "[THINK]I am old.[/THINK]A ghost."
    found = locate(chat_of("ministral-3"), [USER, assistant(content)])
    assert texts(chat_of("ministral-3"), found) == [
        (0, "whole", content),
        (0, "think", "I am old."),
        (0, "answer", "A ghost."),
    ]


TEXT = st.text(st.sampled_from("abghost  .,?!:'\n\t#`*ÄéÜ✓👻漢ñ<>[]|_"), max_size=30).map(str.strip)


@pytest.mark.parametrize("name", ["chatml", "llama-3.3", "qwen-3", "gemma-2"])
@given(thought=TEXT, said=TEXT.filter(bool), system=st.booleans())
def test_random_texts(chat_of: ChatOf, name: str, thought: str, said: str, system: bool) -> None:
    chat = chat_of(name)
    content = f"<think>\n{thought}\n</think>\n\n{said}" if thought else said
    messages = [*([SYSTEM] if system else []), USER, assistant("One."), USER, assistant(content)]
    found = locate(chat, messages)
    expected = [("whole", content), *([("think", thought)] if thought else []), ("answer", said)]
    assert texts(chat, found) == [(0, "whole", "One."), (0, "answer", "One."), *((1, *part) for part in expected)]
    if thought or name != "qwen-3":
        assert found.prompt == chat.encode_prompt(messages[:-1])
        # What is imported is what was generated.
        assert continue_conversation(chat, messages[:-1], found.prompt, found.response) == found


GENERATED = [
    ("qwen-3", THOUGHT, "I am old.", "A ghost."),
    ("qwen-3", UNTHOUGHT, None, "A ghost."),
    ("qwen-3", "A ghost.", None, "A ghost."),
    ("qwen-3", CUT, "I am o", None),
    ("qwen-3-thinking", UNOPENED, "I am old.", "A ghost."),
    ("qwen-3-thinking", "I am o", "I am o", None),
    ("deepseek-r1", UNOPENED, "I am old.", "A ghost."),
    ("deepseek-r1", "I am o👻", "I am o👻", None),
    ("llama-3.1", THOUGHT, "I am old.", "A ghost."),
    ("llama-3.1", CUT, "I am o", None),
    ("gemma-2", UNSAID, "I am old.", None),
    ("ministral-3", "[THINK]I am old.[/THINK]A ghost.", "I am old.", "A ghost."),
    ("ministral-3", "[THINK]I am o", "I am o", None),
]


@pytest.mark.parametrize(("name", "text", "thought", "said"), GENERATED)
def test_generated_response(chat_of: ChatOf, name: str, text: str, thought: str | None, said: str | None) -> None:
    chat = chat_of(name)
    messages = [USER, assistant("Ask."), USER]
    prompt, response = chat.encode_prompt(messages), chat.encode_text(text)
    found = continue_conversation(chat, messages, prompt, response)
    assert (found.prompt, found.response) == (prompt, response)
    parts = zip(("whole", "think", "answer"), (text, thought, said), strict=True)
    assert texts(chat, found) == [(0, "whole", "Ask."), (0, "answer", "Ask.")] + [
        (1, part, value) for part, value in parts if value is not None
    ]
    whole = next(span for span in found.spans if span.turn == 1)
    assert (whole.start, whole.stop) == (len(prompt), len(prompt) + len(response))


def test_markers_are_one_token_or_several(chat_of: ChatOf) -> None:
    """So that the responses above hold both kinds."""
    markers = {"qwen-3": "<think>", "deepseek-r1": "</think>", "ministral-3": "[/THINK]", "llama-3.1": "<think>"}
    assert [len(chat_of(name).encode_text(marker)) > 1 for name, marker in markers.items()] == [False] * 3 + [True]


def test_thinking_is_switched_off(chat_of: ChatOf) -> None:
    chat = chat_of("qwen-3", thinking=False)
    assert chat.render([USER], add_generation_prompt=True).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    found = locate(chat, [USER, assistant("A ghost.")])
    assert found.prompt == chat.encode_prompt([USER])
    assert texts(chat, found) == [(0, "whole", "A ghost."), (0, "answer", "A ghost.")]
    on, default = chat_of("qwen-3", thinking=True), chat_of("qwen-3")
    assert on.encode_prompt([USER]) == default.encode_prompt([USER]) != chat.encode_prompt([USER])
    assert len({chat.template_hash, on.template_hash, default.template_hash}) == 3


@pytest.mark.parametrize(
    ("name", "pinned", "other"),
    [
        ("llama-3.2", "Today Date: 26 Jul 2024\n", "Today Date: 1 Feb 2030\n"),
        ("mistral-small", "The current date is 2024-07-26.", "The current date is 2030-02-01."),
        ("gpt-oss", "Current date: 2024-07-26\n", "Current date: 2030-02-01\n"),
    ],
)
def test_date_is_pinned(chat_of: ChatOf, name: str, pinned: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(name)
    before = chat.template_hash

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Later":
            return cls(2031, 5, 17)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    # Left to itself the template would ask that clock.
    assert "2031" in chat.tokenizer.apply_chat_template([USER], tokenize=False)
    assert pinned in chat.render([USER], add_generation_prompt=True)
    assert chat.template_hash == before
    later = chat_of(name, date_string="1 Feb 2030")
    assert other in later.render([USER], add_generation_prompt=True)
    assert later.template_hash != before


@pytest.mark.parametrize(("name", "policy"), [("gemma-2", "folded"), ("gemma-3", "native"), ("phi-3-medium", "folded")])
def test_system_policy(chat_of: ChatOf, name: str, policy: str) -> None:
    chat = chat_of(name)
    assert chat.system_policy == policy
    assert f"{SYSTEM['content']}\n\n{USER['content']}" in chat.render([SYSTEM, USER], add_generation_prompt=True)


def test_conversation_that_the_template_refuses(chat_of: ChatOf) -> None:
    refusal = "the chat template refuses the conversation: Conversation roles must alternate"
    for content in ("A ghost.", ""):
        with pytest.raises(UnstableBoundaryError, match=f"^{refusal}"):
            locate(chat_of("gemma-2"), [USER, USER, assistant(content)])
