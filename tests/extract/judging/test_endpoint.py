import pytest

from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.endpoint import (
    LONGEST_WAIT,
    api_key,
    endpoint_url,
    extra_body,
    retry_after,
)
from personaspace.extract.judging.pace import pause
from personaspace.store.errors import InputError


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e9"}, LONGEST_WAIT),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=10.0) == seconds


def test_pauses_grow_and_are_spread() -> None:
    spans = [[pause(attempt, 0.5, None) for _ in range(200)] for attempt in range(12)]
    for attempt, span in enumerate(spans):
        mean = min(60, 0.5 * 2**attempt)
        assert 0.5 * mean <= min(span) < max(span) <= 1.5 * mean
    assert 3 <= pause(0, 0.5, 3) <= 3.5


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "judge.base_url: 'localhost:8000' is no URL such as http://localhost:8000/v1."),
        ("https://me:secret@host/v1", "judge.base_url: of host: holds a user, a password or a query"),
        ("https://host/v1?key=secret", "judge.base_url: of host: holds a user, a password or a query"),
    ],
)
def test_urls_that_are_none_or_hold_a_secret_are_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        endpoint_url(JudgeConfig(base_url=url))
    assert "secret" not in str(raised.value)


def test_the_key_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    config = JudgeConfig(api_key_env="MY_KEY")
    assert api_key(config, "http://127.0.0.1:1/v1")
    with pytest.raises(
        InputError, match=r"the environment variable MY_KEY is not set. Put the key of https://far there."
    ):
        api_key(config, "https://far")
    monkeypatch.setenv("MY_KEY", " k \n")
    assert api_key(config, "https://far") == "k"


def test_further_fields_of_a_request() -> None:
    assert extra_body(JudgeConfig(extra_body='{"reasoning_effort": "low"}')) == {"reasoning_effort": "low"}
    with pytest.raises(InputError, match=r"judge.extra_body: temperature can't be set here"):
        extra_body(JudgeConfig(extra_body='{"temperature": 1}'))
    with pytest.raises(InputError, match=r"judge.extra_body: '{' is no JSON"):
        extra_body(JudgeConfig(extra_body="{"))
