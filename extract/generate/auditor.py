"""Who plays the user of a conversation: its script, the model itself, or another one behind an API."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import AuditorConfig, GenerateConfig
from personaspace.extract.endpoint import Endpoint, MalformedError, RefusedError
from personaspace.extract.generate.conversations import Asked, Player, Said, Script, User
from personaspace.extract.generate.engine import Engine
from personaspace.extract.scenarios import player_messages
from personaspace.store.errors import InputError

KEY = "personas.auditor.endpoint"
SEED_BITS = 31
"""Of the seeds that endpoints take."""
ASKED = 3
"""Times that a model is asked for a turn before the conversation breaks off: it may come empty, cut or withheld."""
REFUSED = "the auditor refused"


def choose_user(
    auditor: AuditorConfig, engine: Engine, chat: ChatFormat, generate: GenerateConfig, *, max_positions: int | None
) -> User:
    """The user that the config asks for. Raises InputError where an endpoint's address is missing."""
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
        self._config, self._endpoint = config, Endpoint(config.endpoint, KEY)

    def speak(self, asked: Sequence[Asked]) -> list[Said]:
        """The user's turns, asked for side by side.

        Raises InputError for what no conversation can get past (key, model, URL, or a request that is refused for each
        of several conversations), EndpointError for an endpoint that goes on failing.
        """
        with ThreadPoolExecutor(self._config.endpoint.concurrency) as threads:
            said = list(threads.map(self._ask, asked))
        if len(said) > 1 and all(one.refused.startswith(REFUSED) for one in said):
            raise InputError(
                f"{KEY}: {self._config.endpoint.model} at {self._config.endpoint.base_url} refuses every request. "
                f"The first: {said[0].refused}. Nothing of these conversations was stored."
            )
        return said

    def _ask(self, asked: Asked) -> Said:
        assert asked.planned.script is not None
        assert self._config.endpoint.model is not None  # plan_scenarios has seen to it.
        messages = player_messages(asked.planned.script.user, asked.messages)
        for attempt in range(ASKED):
            try:
                answer = self._endpoint.chat(
                    self._config.endpoint.model,
                    messages,
                    temperature=self._config.temperature,
                    max_tokens=self._config.max_tokens,
                    seed=(asked.seed + attempt) % 2**SEED_BITS,
                )
            except RefusedError as error:
                return Said(text="", refused=f"{REFUSED}: {error}")
            except MalformedError:
                continue
            if answer.finish_reason != "content_filter" and answer.text.strip():
                return Said(text=answer.text.strip())
        return Said(text="", refused=f"the auditor gave no answer that can be used, asked {ASKED} times")
