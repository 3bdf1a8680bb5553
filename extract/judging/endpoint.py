"""An OpenAI-compatible endpoint: one request, and what can come of it."""

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

import openai

from personaspace.extract.endpoint import EndpointError, told_by_server
from personaspace.extract.judging.config import JudgeConfig
from personaspace.store.errors import InputError

OPENAI_URL = "https://api.openai.com/v1"
LONGEST_WAIT = 600.0
"""Seconds that an endpoint may ask us to wait; more counts as this."""
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class FailedRequestError(Exception):
    """A request failed, as the next one may not. The message is the reason."""

    def __init__(self, reason: str, *, wait: float | None = None, may_cost: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the endpoint asks us to wait."""
        self.may_cost = may_cost
        """The endpoint may have done the work all the same."""


class RefusedRequestError(Exception):
    """The endpoint won't answer this request, however often it is sent. The message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a judge answered."""

    text: str
    complete: bool
    """It was not cut off."""
    model: str
    """That answered, as it says."""
    prompt_tokens: int | None
    """As the endpoint counted, or None."""
    completion_tokens: int | None


class Judge(Protocol):
    """Whatever answers a judge's prompts."""

    async def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """One answer. Raises FailedRequestError, RefusedRequestError, or EndpointError where nothing will help."""

    async def close(self) -> None:
        """Let go of what it holds."""


class Endpoint:
    """The endpoint of a config, with the key in the environment."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self.url = endpoint_url(config)
        self._key = api_key(config, self.url)
        self._extra = extra_body(config)
        # Attempts are counted, paid and spaced by the session, across all requests, so the client makes one only.
        self._client = openai.AsyncOpenAI(api_key=self._key, base_url=self.url, timeout=config.timeout, max_retries=0)

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """One answer to the messages, after one request."""
        config = self._config
        options: dict[str, Any] = {config.token_limit: config.max_tokens}
        if config.temperature is not None:
            options["temperature"] = config.temperature
        try:
            # The client's own time-out starts anew with each piece that arrives.
            async with asyncio.timeout(config.timeout):
                completion = await self._client.chat.completions.create(
                    model=config.model or "",
                    messages=[dict(message) for message in messages],
                    extra_body=self._extra,
                    **options,
                )
        except (openai.APITimeoutError, TimeoutError):
            raise FailedRequestError(f"no answer within {config.timeout:g} s", may_cost=True) from None
        except openai.APIConnectionError as error:
            reason = self._clean(str(error.__cause__ or error)) or type(error.__cause__ or error).__name__
            raise FailedRequestError(f"connection lost: {reason}", may_cost=True) from None
        except openai.APIStatusError as error:
            raise self._explain(error) from None
        except (openai.OpenAIError, ValueError) as error:
            reason = f"the endpoint sent no completion: {self._clean(str(error))}"
            raise FailedRequestError(reason, may_cost=True) from None
        return self._reply(completion)

    def _reply(self, completion: Any) -> Reply:
        try:
            choice, usage = completion.choices[0], completion.usage
            text, model = choice.message.content or "", completion.model
        except (AttributeError, IndexError, TypeError, KeyError):
            raise FailedRequestError("the endpoint sent no completion", may_cost=True) from None
        if not isinstance(text, str):
            raise FailedRequestError("the endpoint sent a completion without text", may_cost=True)
        return Reply(
            text=self._clean(text),
            complete=choice.finish_reason != "length",
            model=self._clean(str(model)),
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
        )

    def _explain(self, error: openai.APIStatusError) -> Exception:
        """What an answer other than 200 means for the request, or for all of them."""
        status, config = error.status_code, self._config
        said = self._clean(told_by_server(error)[:500])
        if status == 401:
            return EndpointError(f"{self.url}: refuses the key in the variable {config.api_key_env} (401): {said}")
        if status == 404:
            return EndpointError(f"{self.url}: knows no model {config.model!r}, or no chat completions (404): {said}")
        if status == 402 or (status == 429 and error.code == "insufficient_quota"):
            return EndpointError(f"{self.url}: the account has no credit left ({status}): {said}")
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(error.response.headers, time.time())
            return FailedRequestError(f"{status}: {said}", wait=wait)
        return RefusedRequestError(f"{status}: {said}")

    def _clean(self, text: str) -> str:
        """The text without the key, which some servers repeat."""
        return text.replace(self._key, "(key)")


def endpoint_url(config: JudgeConfig) -> str:
    """Where the judge is. Raises InputError for a URL that is none, or holds a password."""
    url = (config.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"judge.base_url: {url!r} is no URL such as http://localhost:8000/v1.")
    if parts.username or parts.password or parts.query:
        raise InputError(
            f"judge.base_url: of {parts.hostname}: holds a user, a password or a query, which would be stored with the "
            "run. Put the key into the environment variable that judge.api_key_env names."
        )
    return url


def extra_body(config: JudgeConfig) -> dict[str, Any]:
    """Further fields of each request. Raises InputError if they are no JSON object, or are settings of ours."""
    try:
        fields = json.loads(config.extra_body)
    except ValueError as error:
        raise InputError(f"judge.extra_body: {config.extra_body!r} is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise InputError(f"judge.extra_body: {config.extra_body!r} is no JSON object.")
    for name in ("model", "messages", "stream", "n", "temperature", "max_tokens", "max_completion_tokens"):
        if name in fields:
            raise InputError(f"judge.extra_body: {name} can't be set here; judging sets it itself.")
    return fields


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the headers ask us to wait at ``now`` (Unix seconds): a number, or a date; None if they don't."""
    text = headers.get("retry-after-ms")
    if text is not None:
        try:
            return min(max(0.0, float(text) / 1000), LONGEST_WAIT)
        except ValueError:
            pass  # Damaged; the other header may say it.
    text = headers.get("retry-after")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except ValueError:
            return None
    return min(max(0.0, seconds), LONGEST_WAIT) if seconds == seconds else None


def api_key(config: JudgeConfig, url: str) -> str:
    """The key in the environment. Raises InputError if there is none, unless the endpoint is on this machine."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        if urlsplit(url).hostname in _LOCAL:
            return "none-needed"  # The client insists on one.
        raise InputError(
            f"judge.api_key_env: the environment variable {config.api_key_env} is not set. Put the key of {url} there."
        )
    return key


def _count(usage: object, name: str) -> int | None:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None
