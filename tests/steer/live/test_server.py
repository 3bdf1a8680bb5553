"""The endpoint over real HTTP, with the `openai` client and with clients that misbehave."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import uvicorn

from personaspace.extract.config import ModelConfig
from personaspace.steer.interventions import Intervention
from personaspace.steer.live.gauge import Gauge
from personaspace.steer.live.protocol import MOST_BYTES
from personaspace.steer.live.server import Service, make_app
from personaspace.steer.live.talker import Talker
from tests.models import tiny_checkpoint

AXIS_D = np.random.default_rng(0).normal(size=32).astype(np.float32)
GAUGE = Gauge(layer=3, axis_D=AXIS_D, role_mean=0.0, default_mean=2.0, low=0.5, high=1.5)
PUSH = Intervention(method="cap", layer=2, vector_D=AXIS_D, value=25.0)
HELLO = [{"role": "user", "content": "Who are you?"}]
TOKEN = "a token that nobody guesses"


@contextmanager
def serving(talker: Talker, **changes: Any) -> Iterator[int]:
    """A server on a free port, in a thread."""
    service = Service(**{"talker": talker, "name": "tiny", "interventions": (PUSH,), "gauge": GAUGE, **changes})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(make_app(service), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talker]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
    config = ModelConfig(id=str(folder), dtype="float32")
    with Talker(config, [GAUGE], device="cpu", at_once=4, waiting=60) as talker:
        yield talker


@pytest.fixture(scope="module")
def port(talker: Talker) -> Iterator[int]:
    with serving(talker) as port:
        yield port


def client(port: int, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def idle(talker: Talker) -> None:
    deadline = time.monotonic() + 20
    while talker.load != (0, 0):
        assert time.monotonic() < deadline, talker.load
        time.sleep(0.02)


def test_the_openai_client(port: int) -> None:
    ask: dict[str, Any] = {"messages": HELLO, "max_tokens": 12, "seed": 7}
    with client(port) as api:
        assert [model.id for model in api.models.list()] == ["tiny", "tiny-plain"]
        capped, plain = (api.chat.completions.create(model=name, **ask) for name in ("tiny", "tiny-plain"))
        again = api.chat.completions.create(model="tiny", **ask)
        assert capped.choices[0].message.content == again.choices[0].message.content
        assert capped.choices[0].message.content != plain.choices[0].message.content
        assert capped.usage is not None
        assert capped.usage.completion_tokens <= 12
        place = (capped.model_extra or {})["personaspace"]
        assert (place["steered"], place["layer"], place["default_range"]) == (True, 3, [0.5, 1.5])
        assert place["position"] == pytest.approx(place["projection"] / 2)
        assert place["projection"] > (plain.model_extra or {})["personaspace"]["projection"]

        chunks = list(
            api.chat.completions.create(model="tiny", stream=True, stream_options={"include_usage": True}, **ask)
        )
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(texts) == capped.choices[0].message.content
        assert sum(map(bool, texts)) > 3
        [told] = [chunk for chunk in chunks if "personaspace" in (chunk.model_extra or {})]
        assert told.choices[0].finish_reason == capped.choices[0].finish_reason
        assert (told.model_extra or {})["personaspace"] == place
        assert chunks[-1].usage == capped.usage


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt-9"}, 404, "there is no model 'gpt-9'; there are tiny, tiny-plain."),
        ({"tools": []}, 400, "tools: Extra inputs are not permitted. Known are model, messages,"),
        ({"temperature": 9}, 400, "temperature: Input should be less than or equal to 2."),
        ({"n": 2}, 400, "n: Input should be 1."),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: Input should be 'system', 'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content: Input should be",
        ),
        ({"max_tokens": 100_000}, 400, "the model's context holds 256"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1."),
    ],
)
def test_what_can_not_be_done_is_said(port: int, change: dict[str, Any], status: int, message: str) -> None:
    code, answer, _ = post(port, json.dumps({"model": "tiny", "messages": HELLO, **change}).encode())
    assert (code, message in answer["error"]["message"]) == (status, True), answer


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 1}', b'{"model": "tiny"' * 1000])
def test_malformed_bodies(port: int, body: bytes) -> None:
    code, answer, _ = post(port, body)
    assert code == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_too_large_bodies_are_not_even_read(port: int) -> None:
    code, answer, _ = post(port, b"x" * (MOST_BYTES + 1))
    assert (code, answer["error"]["code"]) == (413, "request_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    endless = (b"x" * 100_000 for _ in range(1000))
    try:
        connection.request(
            "POST", "/v1/chat/completions", body=endless, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # It hung up while we were still sending.
    finally:
        connection.close()


def test_fifty_at_once(port: int, talker: Talker) -> None:
    """All are answered, each as if alone, in bounded memory."""
    before = psutil.Process().memory_info().rss

    async def ask(api: openai.AsyncOpenAI, number: int) -> str:
        created: Any = await api.chat.completions.create(
            model=("tiny", "tiny-plain")[number % 2], messages=HELLO, max_tokens=12, seed=7, stream=number % 3 > 0
        )
        if number % 3 == 0:
            return str(created.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in created])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120) as api:
            return await asyncio.gather(*(ask(api, number) for number in range(50)))

    texts = asyncio.run(all_of_them())
    assert len({texts[number] for number in range(0, 50, 2)}) == 1
    assert len({texts[number] for number in range(1, 50, 2)}) == 1
    assert texts[0] != texts[1]
    assert psutil.Process().memory_info().rss - before < 300e6
    idle(talker)


def test_clients_that_vanish_free_their_place(port: int, talker: Talker) -> None:
    long = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "temperature": 2}
    for stream in (True, False):
        held = [start(port, {**long, "stream": stream}) for _ in range(8)]
        if stream:
            assert all(one.recv(2000) for one in held)
        for one in held:
            one.close()
        idle(talker)
    assert post(port, json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 3}).encode())[0] == 200


def test_slow_clients_hold_up_nobody(port: int) -> None:
    """One that reads nothing, and one that never ends its request."""
    deaf = start(port, {"model": "tiny", "messages": HELLO, "max_tokens": 200, "stream": True})
    mute = socket.create_connection(("127.0.0.1", port))
    mute.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    try:
        began = time.monotonic()
        assert post(port, json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 3}).encode())[0] == 200
        assert time.monotonic() - began < 30
    finally:
        deaf.close()
        mute.close()


def test_a_full_queue_turns_away(talker: Talker) -> None:
    folder = talker.chat.tokenizer.name_or_path
    config = ModelConfig(id=folder, dtype="float32")
    with Talker(config, device="cpu", at_once=1, waiting=1) as small, serving(small, gauge=None) as port:
        held = [
            start(port, {"model": "tiny", "messages": HELLO, "max_tokens": 200, "temperature": 2}) for _ in range(2)
        ]
        deadline = time.monotonic() + 20
        while sum(small.load) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        code, answer, headers = post(port, json.dumps({"model": "tiny", "messages": HELLO}).encode())
        assert (code, answer["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "2")
        for one in held:
            one.close()


def test_an_answer_that_takes_too_long(talker: Talker) -> None:
    with serving(talker, timeout=0.001) as port:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 230, "temperature": 2}
        assert post(port, json.dumps(body).encode())[0] == 504
        with client(port) as api, pytest.raises(openai.APIError, match=r"no answer within 0\.001 s"):
            list(api.chat.completions.create(stream=True, **body))
    idle(talker)


def test_a_token_is_asked_for(talker: Talker) -> None:
    with serving(talker, token=TOKEN) as port:
        with client(port, "wrong") as api, pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            api.models.list()
        with client(port, TOKEN) as api:
            assert len(list(api.models.list())) == 2
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok", "active": 0, "waiting": 0}


def post(port: int, body: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body=body, headers={"Content-Type": "application/json"})
    response = connection.getresponse()
    found = json.loads(response.read())
    headers = {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    return response.status, found, headers


def start(port: int, body: dict[str, Any]) -> socket.socket:
    """A request that was sent and whose answer nobody has read."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection
