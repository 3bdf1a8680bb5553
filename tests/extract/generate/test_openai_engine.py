"""The openai engine against a real local server that a real engine answers, and that misbehaves on command."""

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import EndpointConfig, GenerateConfig, ModelConfig
from personaspace.extract.endpoint import Completion, Endpoint, EndpointError
from personaspace.extract.generate.ending import checkpoint_stop_ids
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.openai_engine import KEY, Manner, OpenAIEngine, UncertainTokensError, recover_tokens
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.store.errors import InputError
from tests.extract.generate.completions_server import CompletionsServer, Fault, with_usage, without
from tests.models import NO_SYSTEM, reciting_checkpoint, tiny_checkpoint

pytest.importorskip("openai")

CONFIG = GenerateConfig(engine="openai", max_new_tokens=24)
ROWS = 10
SAID = "I see the old house."


class Model:
    """A checkpoint, its engine, and prompts."""

    def __init__(self, folder: Path, chat_template: str = "builtin") -> None:
        config = ModelConfig(id=str(folder), chat_template=chat_template)
        self.checkpoint = resolve(config)
        self.chat = ChatFormat(self.checkpoint, config)
        self.engine = TransformersEngine(load_causal_lm(self.checkpoint, dtype="float32"), self.chat)
        self.stops = checkpoint_stop_ids(self.checkpoint, self.chat)
        asked = [[{"role": "user", "content": f"Who are you, {row}?"}] for row in range(ROWS)]
        self.prompts = [self.chat.encode_prompt(messages) for messages in asked]

    def truth(self) -> list[Response]:
        return self.engine.generate(self.prompts, range(ROWS), CONFIG)

    def serve(self, **options: Any) -> CompletionsServer:
        return CompletionsServer(self.engine, self.chat, end=self.stops[0], **options)

    def ask(self, server: CompletionsServer, **settings: Any) -> OpenAIEngine:
        config = EndpointConfig(base_url=server.url, **{"retries": 2, "timeout": 20.0, **settings})
        return OpenAIEngine(Endpoint(config, KEY), self.chat, self.stops, source="tiny")

    def responses(self, server: CompletionsServer, **settings: Any) -> list[Response]:
        return self.ask(server, **settings).generate(self.prompts, range(ROWS), CONFIG)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_checkpoint(tmp_path_factory.mktemp("random"), layers=1))


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(reciting_checkpoint(tmp_path_factory.mktemp("reciting"), "\n", f"{SAID}<|im_end|>"))


@pytest.fixture
def server(reciting: Model) -> Iterator[CompletionsServer]:
    with reciting.serve() as server:
        yield server


def test_token_ids_come_back_as_they_were_sampled(random_model: Model) -> None:
    with random_model.serve() as server:
        engine = random_model.ask(server, concurrency=3)
        assert engine.manner == Manner(prompts_as_ids=True, tells_ids=True)
        assert engine.generate(random_model.prompts, range(ROWS), CONFIG) == random_model.truth()
        assert len(server.asked) == ROWS
        assert 1 < server.busiest <= 3
        for body, prompt in zip(sorted(server.asked, key=lambda body: body["seed"]), random_model.prompts, strict=True):
            assert body["prompt"] == prompt
            assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 24)
            # What a server or its checkpoint would put in place of fields that are left out.
            assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (-1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "manner"),
    [
        ({"tells_ids": False}, Manner(prompts_as_ids=True, tells_ids=False)),
        ({"strict": True}, Manner(prompts_as_ids=True, tells_ids=False)),
        ({"strict": True, "takes_ids": False}, Manner(prompts_as_ids=False, tells_ids=False)),
    ],
)
def test_text_becomes_the_tokens_that_it_came_from(
    reciting: Model, random_model: Model, options: dict[str, Any], manner: Manner
) -> None:
    with reciting.serve(**options) as server:
        assert reciting.ask(server).manner == manner
        assert reciting.responses(server) == reciting.truth()
    # A random model's tokens are seldom those of its text: it is dropped, or the text has these tokens.
    with random_model.serve(**options) as server:
        responses = random_model.responses(server)
    unusable = [response for response in responses if response.unusable is not None]
    assert unusable
    assert all(response.unusable.startswith("the server told no token ids") for response in unusable)
    for response, truth in zip(responses, random_model.truth(), strict=True):
        assert response.unusable or random_model.chat.decode(response.token_ids) == truth.text
        assert response.unusable is None or response.token_ids == []


def test_stop_strings_are_cut(tmp_path: Path) -> None:
    model = Model(reciting_checkpoint(tmp_path, ":", f" {SAID}\nUser:", None), "plain")
    for options in ({}, {"tells_ids": False}):
        with model.serve(**options) as server:
            assert {response.text for response in model.responses(server)} == {f" {SAID}"}
            assert server.asked[0]["stop"] == ["\nUser:"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429, '{"error": {"message": "slow down"}}', {"Retry-After": "0.3"}),
        Fault(500, "oops"),
        Fault(503, ""),
        Fault(200, '{"choices": [{"te'),
        Fault(200, "<html>", {"Content-Type": "text/html"}),
        Fault(200, "[]"),
        Fault(200, '{"choices": []}'),
        without("text"),
        without("finish_reason"),
        Fault(200, "{}", hang=1.0),
    ],
)
def test_what_fails_is_asked_again(reciting: Model, server: CompletionsServer, fault: Any) -> None:
    engine = reciting.ask(server, timeout=0.5 if isinstance(fault, Fault) and fault.hang else 20.0)
    server.faults.extend([fault, fault])
    assert engine.generate(reciting.prompts, range(ROWS), CONFIG) == reciting.truth()
    assert len(server.asked) == ROWS + 2


def test_a_server_that_says_when_is_not_asked_before(reciting: Model, server: CompletionsServer) -> None:
    engine = reciting.ask(server)
    server.faults.append(Fault(429, "{}", {"Retry-After": "2"}))
    begin = time.monotonic()
    assert engine.generate(reciting.prompts[:1], [0], CONFIG) == reciting.truth()[:1]
    assert time.monotonic() - begin >= 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(500, '{"error": {"message": "no memory"}}'), "fails after 2 tries: 500: "),
        (Fault(hang=3.0), "gives no answer within 0.5 s, after 2 tries."),
    ],
)
def test_a_server_that_keeps_failing_ends_the_run(
    reciting: Model, server: CompletionsServer, fault: Fault, message: str
) -> None:
    engine = reciting.ask(server, retries=1, timeout=0.5)
    server.faults.extend([fault] * 4)
    with pytest.raises(EndpointError) as error:
        engine.generate(reciting.prompts[:2], [0, 1], CONFIG)
    assert str(error.value).startswith(f"{server.url} {message}")
    assert str(error.value).endswith("What is committed is safe; the same command resumes.")


def test_a_server_that_is_not_there(reciting: Model) -> None:
    with reciting.serve() as server:
        url = server.url
    with pytest.raises(
        EndpointError, match=rf"^{url} can't be reached, after 2 tries: .*refused.*\. What is committed"
    ):
        OpenAIEngine(Endpoint(EndpointConfig(base_url=url, retries=1), KEY), reciting.chat, [], source="tiny")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(400, '{"error": {"message": "too long"}}'), "the server refuses it: 400: .*too long.*"),
        (Fault(200, "nonsense", {"Content-Type": "text/plain"}), "the server's answer can't be read: it holds no .*"),
        (without("text"), "the server's answer can't be read: its choice holds no text"),
        (with_usage(prompt_tokens=4), r"the server read 4 tokens of a prompt that has \d+"),
        (
            lambda answer: {**answer, "choices": [{**answer["choices"][0], "finish_reason": "content_filter"}]},
            "the server ended it with 'content_filter'",
        ),
    ],
)
def test_one_rollout_is_dropped_for_its_own_reason(
    reciting: Model, server: CompletionsServer, fault: Any, reason: str
) -> None:
    engine = reciting.ask(server, concurrency=1)
    server.faults.extend([fault] * (3 if "can't be read" in reason else 1))
    first, *others = engine.generate(reciting.prompts, range(ROWS), CONFIG)
    assert first.token_ids == []
    assert first.unusable is not None
    assert re.fullmatch(reason, first.unusable)
    assert others == reciting.truth()[1:]


def test_another_model_ends_the_run(reciting: Model, server: CompletionsServer) -> None:
    engine = reciting.ask(server)
    server.faults.append(lambda answer: {**answer, "model": "cheaper"})
    with pytest.raises(EndpointError) as error:
        engine.generate(reciting.prompts, range(ROWS), CONFIG)
    assert str(error.value) == (
        f"{server.url} answers as cheaper now, and before as tiny. What is committed is safe; the same command resumes."
    )


def test_which_model_is_asked(reciting: Model, server: CompletionsServer) -> None:
    assert reciting.ask(server).model == "tiny"
    server.models = ["other", "tiny"]
    assert reciting.ask(server).model == "tiny"
    server.models = ["other", "another"]
    with pytest.raises(InputError) as error:
        reciting.ask(server)
    assert str(error.value) == (
        f"generate.endpoint.model: {server.url} lists 2 models (other, another), and none is tiny. Say which one to "
        "ask."
    )
    with pytest.raises(InputError) as error:
        reciting.ask(server, model="other")
    assert str(error.value) == (
        f"generate.endpoint.model: asked for other, {server.url} answers as tiny. Give the name of the model that it "
        "serves, and make sure that it is the model of `model.id`."
    )
    with pytest.raises(InputError, match=r"generate\.endpoint: http://\S+: 404: .*no model nobody"):
        reciting.ask(server, model="nobody")


def test_a_server_that_reads_other_prompts_is_refused(reciting: Model) -> None:
    with (
        reciting.serve(strict=True, takes_ids=False, bos=1) as server,
        pytest.raises(InputError, match=r"can't be used: the server read 15 tokens of a prompt that has 14\."),
    ):
        reciting.ask(server)
    with (
        reciting.serve(strict=True, takes_ids=False, counts=False) as server,
        pytest.raises(InputError, match="takes no token ids and does not say how many tokens it read of a prompt"),
    ):
        reciting.ask(server)


def test_the_key_is_sent_and_shown_nowhere(
    reciting: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with reciting.serve(key="sk-secret") as server:
        with pytest.raises(InputError) as error:
            reciting.ask(server, api_key_env="MY_KEY")
        assert "refuses the key in MY_KEY (which is not set here): 401" in str(error.value)
        monkeypatch.setenv("MY_KEY", "sk-wrong")
        with pytest.raises(InputError) as error:
            reciting.ask(server, api_key_env="MY_KEY")
        assert str(error.value).startswith(
            f"generate.endpoint.api_key_env: {server.url} refuses the key in MY_KEY: 401: "
        )
        assert "Incorrect API key provided: Bearer (key)" in str(error.value)
        monkeypatch.setenv("MY_KEY", "sk-secret")
        assert reciting.responses(server, api_key_env="MY_KEY") == reciting.truth()
    assert "sk-" not in str(error.value)
    assert "sk-" not in caplog.text


def test_an_address_is_needed() -> None:
    with pytest.raises(InputError) as error:
        Endpoint(EndpointConfig(), KEY)
    assert str(error.value) == (
        "generate.endpoint.base_url: is missing; give the server's address, such as http://HOST:8000/v1 or https://api.openai.com/v1."
    )
    with pytest.raises(InputError, match=r"^generate\.endpoint\.base_url: host:8000 is no address such as "):
        Endpoint(EndpointConfig(base_url="host:8000"), KEY)


def answer(text: str = SAID, **changes: Any) -> Completion:
    plain = Completion(
        model="m", text=text, finish_reason="stop", token_ids=None, prompt_tokens=None, completion_tokens=None
    )
    return replace(plain, **changes)


def test_tokens_that_are_in_doubt(reciting: Model) -> None:
    chat, prompt = reciting.chat, reciting.prompts[0]
    ids = chat.encode_text(SAID)
    assert recover_tokens(chat, prompt, answer(SAID)) == ids
    for counted in (len(ids), len(ids) + 1):
        assert recover_tokens(chat, prompt, answer(SAID, completion_tokens=counted)) == ids
    for changes, reason in (
        ({"completion_tokens": len(ids) + 2}, f"it counted {len(ids) + 2} tokens, and the text has {len(ids)}"),
        ({"completion_tokens": len(ids) - 1}, f"it counted {len(ids) - 1} tokens, and the text has {len(ids)}"),
        ({"completion_tokens": len(ids) + 1, "finish_reason": "length"}, f"it counted {len(ids) + 1} tokens"),
        ({"text": SAID + "<|im_end|>"}, "the text, tokenised and decoded, is another one"),
    ):
        with pytest.raises(UncertainTokensError, match=reason):
            recover_tokens(chat, prompt, answer(**changes))
    # A prompt that ends amid a word: its last token would swallow the response's first.
    halves = {place: (SAID[:place], SAID[place:]) for place in range(1, len(SAID))}
    cuts = [place for place, (head, rest) in halves.items() if ids != chat.encode_text(head) + chat.encode_text(rest)]
    assert cuts
    for place in cuts:
        with pytest.raises(UncertainTokensError, match="is tokenised otherwise behind the prompt than alone"):
            recover_tokens(chat, chat.encode_text(SAID[:place]), answer(SAID[place:]))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_stop_ids_are_those_of_the_transformers_engine(tmp_path: Path, family: str) -> None:
    folder = tiny_checkpoint(tmp_path, family, layers=1, chat_template=NO_SYSTEM)
    for generation in ({"eos_token_id": [5, 2]}, {"eos_token_id": 7}, None):
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        model = Model(folder)
        assert model.stops == model.engine._stop_ids
        assert model.stops
