"""Servers that speak OpenAI's protocol: the connection, its failures in the user's words, and completions.

The `openai` package repeats requests after 408, 409, 429, 5xx, time-outs and lost connections. What it leaves is sorted
here: `InputError` for what the config can mend, `EndpointError` for a server that fails, `RefusedError` for one request
that the server won't take, `MalformedError` for an answer that can't be read. The key is read from the environment and
appears in no message.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from personaspace.extract.config import EndpointConfig
from personaspace.store.errors import InputError, PersonaspaceError

REASKED = 2
"""Times that a request is repeated whose answer can't be read."""
LONGEST_PAUSE = 120.0
"""Seconds for which a server may put a request off; the package's own limit."""
_VERSION = re.compile(r"[-@:.](\d[\w.-]*|latest|main|[0-9a-f]{7,40})")
"""What may follow a model's name: `-2025-04-14`, `@main`."""
_SHOWN = 300
"""Characters of a server's message that are told."""


class EndpointError(PersonaspaceError):
    """A server fails, however often it is asked. What is committed is safe; the same command resumes."""

    exit_code = 6


class RefusedError(Exception):
    """The server won't take this one request; the message is its own."""


class MalformedError(Exception):
    """The server's answer can't be read, however often it is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A server's answer."""

    model: str
    """Which model it says has answered."""
    text: str
    finish_reason: str
    token_ids: tuple[int, ...] | None
    """The sampled tokens, where the server tells them (vLLM's `return_token_ids`)."""
    prompt_tokens: int | None
    """What it counted, if it says so."""
    completion_tokens: int | None
    """The same, with tokens that ended the response."""


def check_endpoint(config: EndpointConfig, key: str) -> None:
    """Raise InputError where nothing could be asked. ``key`` names the section of the config."""
    if config.base_url is None:
        raise InputError(
            f"{key}.base_url: is missing; give the server's address, such as http://HOST:8000/v1 or "
            "https://api.openai.com/v1."
        )
    if not config.base_url.startswith(("http://", "https://")):
        raise InputError(f"{key}.base_url: {config.base_url} is no address such as http://HOST:8000/v1.")


class Endpoint:
    """A connection to a server. Its methods may be called from several threads. ``key`` as in `check_endpoint`."""

    def __init__(self, config: EndpointConfig, key: str) -> None:
        check_endpoint(config, key)
        import openai  # Half a second, which only those pay who need it.

        self.config = config
        self._openai, self._key = openai, key
        self._secret = os.environ.get(config.api_key_env, "")
        self.client = openai.OpenAI(
            base_url=config.base_url,
            api_key=self._secret or "none",
            timeout=config.timeout,
            max_retries=config.retries,
        )

    def served_model(self, wanted: str) -> str:
        """Name of the model to ask for: as configured, or ``wanted`` if it is listed, or the only one that is.

        Raises InputError where that leaves it open.
        """
        if self.config.model is not None:
            return self.config.model
        with self.failures():
            listed = [str(model.id) for model in self.client.models.list()]
        if wanted in listed:
            return wanted
        if len(listed) == 1:
            return listed[0]
        shown = ", ".join(listed[:8]) or "none"
        raise InputError(
            f"{self._key}.model: {self.config.base_url} lists {len(listed)} models ({shown}), and none is {wanted}. "
            "Say which one to ask."
        )

    def complete(self, model: str, prompt: Sequence[int] | str, **settings: Any) -> Completion:
        """One text completion of a prompt, as token ids or as text.

        ``settings`` are fields of the request. Raises the errors of this module.
        """
        for _ in range(REASKED):
            try:
                return self._complete(model, prompt, settings)
            except MalformedError:
                continue
        return self._complete(model, prompt, settings)

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **settings: Any) -> Completion:
        """One chat completion, asked for once. ``settings`` as in `complete`, and the same errors."""
        with self.failures():
            answer: Any = self.client.chat.completions.create(
                model=model, messages=[dict(message) for message in messages], **settings
            )
            return _read(answer)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Around calls of `client`: turns the package's errors into this module's."""
        where = self.config.base_url
        try:
            yield
        except (self._openai.AuthenticationError, self._openai.PermissionDeniedError) as error:
            raise InputError(
                f"{self._key}.api_key_env: {where} refuses the key in {self.config.api_key_env}"
                f"{'' if self._secret else ' (which is not set here)'}: {self._told(error)}"
            ) from None
        except self._openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise RefusedError(self._told(error)) from None
            if error.status_code == 404:
                raise InputError(f"{self._key}: {where}: {self._told(error)}") from None
            raise EndpointError(f"{where} fails after {self._tries()}: {self._told(error)} {_RESUME}") from None
        except self._openai.APITimeoutError:
            raise EndpointError(
                f"{where} gives no answer within {self.config.timeout:g} s, after {self._tries()}. {_RESUME}"
            ) from None
        except self._openai.APIConnectionError as error:
            reason = self._clean(str(error.__cause__ or error))
            raise EndpointError(f"{where} can't be reached, after {self._tries()}: {reason}. {_RESUME}") from None
        except (self._openai.APIResponseValidationError, ValueError) as error:
            raise MalformedError(f"the server's answer can't be read: {self._clean(str(error))}") from None

    def _complete(self, model: str, prompt: Sequence[int] | str, settings: Mapping[str, Any]) -> Completion:
        with self.failures():
            answer: Any = self.client.completions.create(
                model=model, prompt=prompt if isinstance(prompt, str) else list(prompt), **settings
            )
            return _read(answer)

    def _told(self, error: Any) -> str:
        return self._clean(f"{error.status_code}: {told_by_server(error)}")

    def _clean(self, text: str) -> str:
        text = " ".join(text.split())
        if self._secret:
            text = text.replace(self._secret, "(key)")
        return text[:_SHOWN]

    def _tries(self) -> str:
        return f"{self.config.retries + 1} tries"


_RESUME = "What is committed is safe; the same command resumes."


def told_by_server(error: Any) -> str:
    """What a server said with a status other than 200 (openai.APIStatusError)."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    if not isinstance(said, str):
        said = str(error.body if error.body is not None else error.response.text)
    return " ".join(said.split())


def same_model(asked: str, answered: str) -> bool:
    """Whether an answer's model is the one that was asked: the same name, with a version, or without its owner."""
    for name in {asked, asked.rsplit("/", 1)[-1]}:
        for found in {answered, answered.rsplit("/", 1)[-1]}:
            if found == name or (found.startswith(name) and _VERSION.fullmatch(found[len(name) :])):
                return True
    return False


def _read(answer: Any) -> Completion:
    """Raises ValueError naming what is missing: the package takes whatever comes."""
    document: dict[str, Any] = answer.model_dump() if hasattr(answer, "model_dump") else {}
    choices = document.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("it holds no choices")
    choice, usage = choices[0], document.get("usage") or {}
    text, reason, token_ids = choice.get("text"), choice.get("finish_reason"), choice.get("token_ids")
    if "message" in choice:
        text = (choice["message"] or {}).get("content") or ""
    if not isinstance(text, str):
        raise ValueError("its choice holds no text")
    if not isinstance(reason, str):
        raise ValueError("its choice has no finish_reason")
    if token_ids is not None and not all(isinstance(token, int) and token >= 0 for token in token_ids):
        raise ValueError("its token_ids are no token ids")
    return Completion(
        model=str(document.get("model")),
        text=text,
        finish_reason=reason,
        token_ids=None if token_ids is None else tuple(token_ids),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
