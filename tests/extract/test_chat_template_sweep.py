"""Each of the hundreds of templates on the hub that most models use: right spans, or an error; never a guess.

A template is tried with a tokenizer that knows the special tokens of all of them.
"""

import re
from collections import Counter

import pytest
from transformers import LlamaConfig

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.spans import locate
from personaspace.extract.turns import UnstableBoundaryError
from personaspace.store.errors import InputError
from tests.extract.real_templates import Family, template_file, template_index, tiny_tokenizer

SPECIAL = re.compile(
    r"<\|[^|<>\s{}'\"]{1,40}\|>|<\N{FULLWIDTH VERTICAL LINE}[^{}<>]{1,30}\N{FULLWIDTH VERTICAL LINE}>"
    r"|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT|THINK)\]|</?s>|<(?:bos|eos)>"
)
SYSTEM = {"role": "system", "content": "Be thou a phantom."}
USER = {"role": "user", "content": "Who art thou?"}
ANOTHER = {"role": "user", "content": "And what next?"}
FIRST, SECOND = "The first reply.", "A ghost of old."
THOUGHT = f"<think>\nHm, well.\n</think>\n\n{SECOND}"
REFUSALS = (
    "the rendered conversation does not contain the response as written",
    "a token straddles the boundary between response and template",
    "the chat template renders the prompt differently once a response follows",
    "the chat template refuses the conversation: ",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    found = {token for entry in template_index() for token in SPECIAL.findall(template_file(entry).read_text())}
    folder = tmp_path_factory.mktemp("tokenizer")
    family = Family(template="", sha256="", header="", end="</s>", specials=tuple(sorted(found)), bos="<s>")
    tiny_tokenizer(family).save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)
    return resolve(ModelConfig(id=str(folder)))


def check(chat: ChatFormat, messages: list[dict[str, str]]) -> str:
    """`found`, or the kind of error."""
    try:
        found = locate(chat, messages)
    except UnstableBoundaryError as error:
        kinds = [refusal for refusal in REFUSALS if str(error).startswith(refusal)]
        if not kinds:
            raise
        return kinds[0]
    text = chat.render(messages, add_generation_prompt=False)
    ids = [*found.prompt, *found.response]
    assert ids == chat.encode_text(text)[: len(ids)]
    prompt = chat.tokenizer.decode(found.prompt)
    for message in messages[:-1]:
        # Earlier turns may lose their reasoning, but nothing else.
        assert message["content"].split("\n")[-1] in prompt
    turns = {turn: message["content"] for turn, message in enumerate(m for m in messages if m["role"] == "assistant")}
    assert {span.turn for span in found.spans} == turns.keys()
    for span in found.spans:
        said = chat.tokenizer.decode(ids[span.start : span.stop]).strip()
        reply = turns[span.turn].split("\n")[-1]
        assert said == "Hm, well." if span.part == "think" else said.endswith(reply)
        if span.part == "answer":
            # One template writes other markers in place of those it is given.
            assert said == reply or "<|end_think|>" in said
    return "found"


@pytest.mark.slow
def test_every_template(checkpoint: Checkpoint) -> None:
    outcomes: Counter[str] = Counter()
    for entry in template_index():
        try:
            chat = ChatFormat(checkpoint, ModelConfig(id=checkpoint.source, chat_template=str(template_file(entry))))
        except InputError:
            outcomes["cannot render a conversation"] += 1
            continue
        for messages in (
            [SYSTEM, USER, {"role": "assistant", "content": SECOND}],
            [USER, {"role": "assistant", "content": THOUGHT}],
            [SYSTEM, USER, {"role": "assistant", "content": FIRST}, ANOTHER, {"role": "assistant", "content": SECOND}],
        ):
            outcomes[check(chat, messages)] += 1
    # Most templates of embedding models, of guards and of models that see want other messages than these.
    assert outcomes["found"] >= 2000, outcomes
    assert outcomes["cannot render a conversation"] <= 30, outcomes
