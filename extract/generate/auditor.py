"""Who plays the user of a conversation: its script, the model itself, or another model behind an OpenAI-compatible API.

All that talks to an endpoint is in this file.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import AuditorConfig, GenerateConfig
from personaspace.extract.generate.conversations import Asked, Player, Said, Script, User
from personaspace.extract.generate.engine import Engine
from personaspace.extract.scenarios import player_messages
from personaspace.store.errors import InputError, PersonaspaceError

SEED_BITS = 31
"""Of the seeds that endpoints take."""
ASKED = 3
"""Times that a model is asked for a turn before the conversation breaks off: it may come empty, cut or withheld."""
REFUSED = "the auditor refused"


class AuditorError(PersonaspaceError):
    """The endpoint that plays the user fails or can't be reached, however often it is asked."""

    exit_code = 5


def choose_user(
    auditor: AuditorConfig, engine: Engine, chat: ChatFormat, generate: GenerateConfig, *, max_positions: int | None
) -> User:
    """The user that the config asks for. Raises InputError where an endpoint's client or key is missing."""
    if auditor.played_by == "endpoint":
        return Auditor(auditor)
    if auditor.played_by == "model":
        return Player(engine, chat, generate, auditor, max_positions=max_positions)
    return Script()


class Auditor:
    """A user played by another model, asked through chat completions.

    What it says is its own affair: with the same seed it may say something else. Only what was said is stored.
    """

    def __init__(self, config: AuditorConfig) -> None:
        self._config = config
        self._key = os.environ.get(config.key, "")
        if not self._key:
            raise InputError(
                f"personas.auditor.key: the environment variable {config.key} is not set where the generators run. "
                "Export it there (for a server without keys, any value), or name another variable."
            )
        import openai  # Half a second, which only those pay who need it.

        self._openai: Any = openai
        self._client = openai.OpenAI(
            api_key=self._key, base_url=config.base_url, timeout=config.timeout, max_retries=config.retries
        )

    def speak(self, asked: Sequence[Asked]) -> list[Said]:
        """The user's turns, asked for side by side.

        Raises InputError for what no conversation can get past (key, model, URL, or a request that is refused for each
        of several conversations), AuditorError for an endpoint that goes on failing.
        """
        with ThreadPoolExecutor(self._config.concurrency) as threads:
            said = list(threads.map(self._ask, asked))
        if len(said) > 1 and all(one.refused.startswith(REFUSED) for one in said):
            raise InputError(
                f"personas.auditor: {self._where} refuses every request. The first: {said[0].refused}. "
                "Nothing of these conversations was stored."
            )
        return said

    @property
    def _where(self) -> str:
        return f"{self._config.model} at {self._client.base_url}"

    def _ask(self, asked: Asked) -> Said:
        assert asked.planned.script is not None
        messages = player_messages(asked.planned.script.user, asked.messages)
        for attempt in range(ASKED):
            text = self._answer(messages, (asked.seed + attempt) % 2**SEED_BITS)
            if isinstance(text, Said):
                return text
            if text:
                return Said(text=text)
        return Said(text="", refused=f"the auditor gave no answer that can be used, asked {ASKED} times")

    def _answer(self, messages: Any, seed: int) -> str | Said:
        """What the model says: empty where it can't be used, Said where it refuses this conversation."""
        try:
            answer = self._client.chat.completions.create(
                model=self._config.model,
                messages=messages,
                temperature=self._config.temperature,
                max_tokens=self._config.max_tokens,
                seed=seed,
            )
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            return Said(text="", refused=f"{REFUSED}: {self._told(error)}")
        except self._openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise InputError(f"personas.auditor: {self._where} says {self._told(error)}") from None
            raise self._failed(error) from None
        except (self._openai.APIResponseValidationError, ValueError):
            return ""  # No JSON, or half of it.
        except self._openai.OpenAIError as error:
            raise self._failed(error) from None
        choices = getattr(answer, "choices", None)
        if not choices or choices[0].finish_reason == "content_filter":
            return ""
        return (choices[0].message.content or "").strip()

    def _failed(self, error: Exception) -> AuditorError:
        return AuditorError(
            f"personas.auditor: {self._where} failed {self._config.retries + 1} times, at last with: "
            f"{self._told(error)}. What is committed is safe; the same command resumes."
        )

    def _told(self, error: Exception) -> str:
        """The error in one line, without the key, which some servers repeat."""
        return " ".join(str(error).replace(self._key, "...").split())[:500] or type(error).__name__
