"""Users played through a real HTTP server: what they are asked, what they say, and what happens when it misbehaves."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from personaspace.extract.config import AuditorConfig, EndpointConfig
from personaspace.extract.endpoint import EndpointError
from personaspace.extract.generate.auditor import ASKED, Auditor
from personaspace.extract.generate.conversations import Asked, Said
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.scenarios import BEGIN, INSTRUCTIONS, Script
from personaspace.store.errors import InputError
from tests.auditor_server import Answer, Completions, completions_server, reply

KEY = "sk-sesame"
Respond = Callable[[dict[str, Any]], Answer]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUDITOR_KEY", KEY)


def asked(number: int = 0, answer: str = "A ghost.") -> Asked:
    script = Script(turns=4, said=("Who are you?",), user=f"You are Ann {number}.")
    messages = ({"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": answer})
    planned = PlannedRollout(
        row=number,
        role_id=0,
        prompt=0,
        question=0,
        sample=0,
        rollout_id=str(number),
        messages=({"role": "system", "content": "Be a ghost."}, *messages[:1]),
        script=script,
    )
    return Asked(planned=planned, turn=1, messages=(planned.messages[0], *messages), seed=2**62 + number)


def auditor(server: Completions, **options: Any) -> Auditor:
    sampling = {name: options.pop(name) for name in ("temperature", "max_tokens") if name in options}
    settings = {"retries": 1, "timeout": 5.0, **options}
    endpoint = EndpointConfig(model="eve", base_url=server.url, api_key_env="AUDITOR_KEY", **settings)
    return Auditor(AuditorConfig(played_by="endpoint", endpoint=endpoint, **sampling))


def speak(respond: Respond, questions: Sequence[Asked], **options: Any) -> tuple[list[Said], Completions]:
    with completions_server(respond) as server:
        return auditor(server, **options).speak(questions), server


def test_the_player_sees_the_conversation_from_its_side() -> None:
    said, server = speak(reply, [asked()], temperature=0.3, max_tokens=40)
    assert said == [Said(text="Turn 2. You said 8 letters. Go on?")]
    [request] = server.asked
    assert request["messages"] == [
        {"role": "system", "content": INSTRUCTIONS.format(user="You are Ann 0.")},
        {"role": "user", "content": BEGIN},
        {"role": "assistant", "content": "Who are you?"},
        {"role": "user", "content": "A ghost."},
    ]
    assert "Be a ghost." not in str(request["messages"])
    assert {name: request[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "eve",
        "temperature": 0.3,
        "max_tokens": 40,
    }
    assert 0 <= request["seed"] < 2**31
    assert (request["authorization"], request["path"]) == (f"Bearer {KEY}", "/v1/chat/completions")


def test_answers_come_in_the_order_of_the_questions_and_side_by_side() -> None:
    """No request is answered before as many are there as may be on their way: fewer would wait for ever."""
    together = threading.Barrier(4, timeout=20)

    def respond(body: dict[str, Any]) -> Answer:
        together.wait()
        return reply(body)

    said, _ = speak(respond, [asked(number, "x" * number) for number in range(8)], concurrency=4, timeout=30.0)
    assert [one.text for one in said] == [f"Turn 2. You said {number} letters. Go on?" for number in range(8)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_waited_for(status: int) -> None:
    failures = iter([status])

    def respond(body: dict[str, Any]) -> Answer:
        code = next(failures, 200)
        return reply(body) if code == 200 else Answer(status=code, text="later", headers={"Retry-After": "0.2"})

    said, server = speak(respond, [asked()])
    assert said[0].text.startswith("Turn 2.")
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    "bad",
    [
        Answer(raw=b'{"id": "x", "choices": [{"ind'),
        Answer(raw=b'{"id": "x", "choices": []}'),
        Answer(raw=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
        Answer(text=""),
        Answer(text="...", finish_reason="content_filter"),
    ],
    ids=["truncated", "no choices", "html", "empty", "withheld"],
)
def test_answers_that_cannot_be_used_are_asked_for_again(bad: Answer) -> None:
    failures = iter([bad] * (ASKED - 1))
    said, server = speak(lambda body: next(failures, None) or reply(body), [asked()])
    assert said[0].text.startswith("Turn 2.")
    assert len({request["seed"] for request in server.asked}) == ASKED
    said, server = speak(lambda _: bad, [asked()])
    assert said == [Said(text="", refused="the auditor gave no answer that can be used, asked 3 times")]
    assert len(server.asked) == ASKED


def test_one_refused_conversation_is_given_up_alone() -> None:
    def respond(body: dict[str, Any]) -> Answer:
        if "Ann 1." in body["messages"][0]["content"]:
            return Answer(status=400, text=f"not this, {KEY}")
        return reply(body)

    said, _ = speak(respond, [asked(number) for number in range(3)])
    assert [bool(one.text) for one in said] == [True, False, True]
    assert said[1].refused.startswith("the auditor refused: 400: not this, (key)")
    assert KEY not in said[1].refused


def test_requests_that_are_all_refused_stop_the_run() -> None:
    with pytest.raises(
        InputError, match=r"eve at http://127\.0\.0\.1:\d+/v1 refuses every request\. The first: .*: 400: bad"
    ):
        speak(lambda _: Answer(status=400, text="bad parameter"), [asked(number) for number in range(3)])


@pytest.mark.parametrize(("status", "text"), [(401, f"wrong key {KEY}"), (404, "no model eve")])
def test_what_no_retry_can_mend_stops_the_run_at_once(status: int, text: str) -> None:
    with completions_server(lambda _: Answer(status=status, text=text)) as server:
        with pytest.raises(InputError, match=rf"personas\.auditor\.endpoint.*: {status}: ") as caught:
            auditor(server).speak([asked()])
        assert len(server.asked) == 1
    assert KEY not in str(caught.value)


def test_an_endpoint_that_goes_on_failing_stops_the_run() -> None:
    with pytest.raises(EndpointError, match=r"fails after 2 tries: 500: down .* the same command resumes\.$"):
        speak(lambda _: Answer(status=500, text="down", headers={"Retry-After": "0.1"}), [asked()])
    with completions_server(reply) as server:
        pass
    with pytest.raises(EndpointError, match=r"can't be reached, after 1 tries: "):
        auditor(server, retries=0).speak([asked()])


def test_a_server_that_hangs_counts_as_failing() -> None:
    over = threading.Event()

    def respond(body: dict[str, Any]) -> Answer:
        over.wait(20)
        return reply(body)

    with completions_server(respond) as server:
        with pytest.raises(EndpointError, match=r"gives no answer within 0\.3 s, after 1 tries"):
            auditor(server, retries=0, timeout=0.3).speak([asked()])
        over.set()


def test_a_missing_key_is_said_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUDITOR_KEY")
    message = r"personas\.auditor\.endpoint\.api_key_env: .* refuses the key in AUDITOR_KEY \(which is not set here\)"
    with (
        completions_server(lambda _: Answer(status=401, text="who?")) as server,
        pytest.raises(InputError, match=message),
    ):
        auditor(server).speak([asked()])


def test_an_address_is_needed() -> None:
    with pytest.raises(InputError, match=r"^personas\.auditor\.endpoint\.base_url: is missing; "):
        Auditor(AuditorConfig(played_by="endpoint", endpoint=EndpointConfig(model="eve")))
