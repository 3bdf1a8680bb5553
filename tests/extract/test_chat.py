"""Chat templates: where they come from, what their hash holds, and how a refused system message is folded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from personaspace.extract.chat import PLAIN_STOP, ChatFormat, fold_system
from personaspace.store.errors import InputError
from tests.models import CHATML, NO_SYSTEM, TRIMMING

ChatWith = Callable[..., ChatFormat]
SYSTEM = {"role": "system", "content": "Be a ghost."}
USER = {"role": "user", "content": "Who are you?"}
ANSWER = {"role": "assistant", "content": "A ghost."}


def test_builtin_template(chat_with: ChatWith) -> None:
    chat = chat_with()
    prompt = "<|im_start|>system\nBe a ghost.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
    assert chat.render([SYSTEM, USER], add_generation_prompt=False) == prompt
    assert chat.render([SYSTEM, USER], add_generation_prompt=True) == prompt + "<|im_start|>assistant\n"
    assert (chat.system_policy, chat.stop_strings) == ("native", [])
    ids = chat.encode_prompt([SYSTEM, USER])
    assert chat.tokenizer.decode(ids) == prompt + "<|im_start|>assistant\n"
    assert chat.decode(ids).startswith("system\nBe a ghost.")


@pytest.mark.parametrize(("template", "bos"), [(TRIMMING, 1), (CHATML, 0)])
def test_bos_comes_from_the_template_alone(chat_with: ChatWith, template: str, bos: int) -> None:
    chat = chat_with(template)
    assert chat.tokenizer("Hello")["input_ids"][0] == chat.tokenizer.bos_token_id
    assert chat.encode_prompt([SYSTEM, USER]).count(chat.tokenizer.bos_token_id) == bos


def test_date_is_pinned(chat_with: ChatWith) -> None:
    assert "Today is 26 Jul 2024." in chat_with(TRIMMING).render([USER], add_generation_prompt=True)
    later = chat_with(TRIMMING, date_string="1 Jan 2030")
    assert "Today is 1 Jan 2030." in later.render([USER], add_generation_prompt=True)


def test_time_that_the_template_asks_for_is_pinned(chat_with: ChatWith) -> None:
    clock = (
        "\n  {% if strftime_now is defined %}It is {{ strftime_now('%A, %-d %B %Y, %H:%M; %y-%m-%d') }}.\n{% endif %}"
    )
    rendered = chat_with(clock + CHATML, date_string="5 Mar 2024").render([USER], add_generation_prompt=False)
    # The line break at the beginning is the template's own.
    assert rendered == ("\nIt is Tuesday, 5 March 2024, 00:00; 24-03-05.\n<|im_start|>user\nWho are you?<|im_end|>\n")


def test_date_that_is_none(chat_with: ChatWith) -> None:
    with pytest.raises(InputError) as error:
        chat_with(CHATML, date_string="2024-07-26")
    assert str(error.value) == "model.date_string: '2024-07-26' is no date such as '26 Jul 2024'."


def test_template_hash_follows_template_date_and_thinking(chat_with: ChatWith) -> None:
    chats = [
        chat_with(CHATML),
        chat_with(TRIMMING),
        chat_with(NO_SYSTEM),
        chat_with(CHATML, date_string="1 Jan 2030"),
        chat_with(CHATML, thinking=True),
        chat_with(CHATML, thinking=False),
        chat_with(CHATML, chat_template="plain"),
    ]
    assert len({chat.template_hash for chat in chats}) == len(chats)
    assert chat_with(CHATML).template_hash == chats[0].template_hash


def test_system_message_is_folded_where_the_template_refuses_it(chat_with: ChatWith) -> None:
    chat = chat_with(NO_SYSTEM)
    assert chat.system_policy == "folded"
    assert chat.render([SYSTEM, USER, ANSWER, USER], add_generation_prompt=True) == (
        "<|im_start|>user\nBe a ghost.\n\nWho are you?<|im_end|>\n<|im_start|>assistant\nA ghost.<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render([USER], add_generation_prompt=False) == "<|im_start|>user\nWho are you?<|im_end|>\n"


def test_system_message_is_folded_where_the_template_leaves_it_out(chat_with: ChatWith) -> None:
    chat = chat_with(
        CHATML.replace("{{", "{% if message['role'] != 'system' %}{{", 1).replace("}}", "}}{% endif %}", 1)
    )
    assert chat.system_policy == "folded"
    rendered = chat.render([SYSTEM, USER], add_generation_prompt=False)
    assert rendered == "<|im_start|>user\nBe a ghost.\n\nWho are you?<|im_end|>\n"


def test_fold_system_leaves_its_input_alone() -> None:
    messages = [SYSTEM, USER]
    assert fold_system(messages) == [{"role": "user", "content": "Be a ghost.\n\nWho are you?"}]
    assert messages == [SYSTEM, USER]
    assert fold_system([USER, ANSWER]) == [USER, ANSWER]
    assert fold_system([]) == []


def test_plain_template_needs_none_in_the_tokenizer(chat_with: ChatWith) -> None:
    chat = chat_with(None, chat_template="plain")
    text = chat.render([SYSTEM, USER, ANSWER, USER], add_generation_prompt=True)
    assert text == "Be a ghost.\n\nUser: Who are you?\nAssistant: A ghost.\nUser: Who are you?\nAssistant:"
    assert chat.stop_strings == [PLAIN_STOP] == ["\nUser:"]
    assert PLAIN_STOP + " Who are you?" in text


def test_jinja_file(chat_with: ChatWith, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    chat = chat_with(CHATML, chat_template=str(file))
    assert chat.render([SYSTEM, USER], add_generation_prompt=True) == "[Be a ghost.][Who are you?]"
    assert chat.template_hash != chat_with(CHATML).template_hash


def test_missing_file(chat_with: ChatWith) -> None:
    with pytest.raises(InputError) as error:
        chat_with(CHATML, chat_template="no/such.jinja")
    assert str(error.value) == (
        "model.chat_template: no/such.jinja is no file; allowed are `builtin`, `plain`, or a Jinja file."
    )


def test_file_that_is_no_template(chat_with: ChatWith, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}")
    with pytest.raises(InputError, match=r"own\.jinja"):
        chat_with(CHATML, chat_template=str(file))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no chat') }}", "no chat"),
        ("{% for tool in None %}{% endfor %}", "TypeError: 'NoneType' object is not iterable"),
        ("{{ messages[0].content.text.strip() }}", "'str object' has no attribute 'text'"),
    ],
)
def test_template_that_renders_no_conversation(chat_with: ChatWith, tmp_path: Path, template: str, reason: str) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(template)
    with pytest.raises(InputError) as error:
        chat_with(CHATML, chat_template=str(file))
    assert str(error.value) == f"model.chat_template: {file} cannot render a conversation: {reason}"


def test_tokenizer_without_template(chat_with: ChatWith) -> None:
    with pytest.raises(InputError) as error:
        chat_with(None)
    source = chat_with(None, chat_template="plain").tokenizer.name_or_path
    assert str(error.value) == (
        f"model.chat_template: builtin, but the tokenizer of {source} has no chat template. "
        "Use `plain` for a base model, or give a Jinja file."
    )
