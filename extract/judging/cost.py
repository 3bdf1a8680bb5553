"""What judging costs: prices, what one request can cost at most, and a purse that is never overdrawn."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from personaspace.extract.judging.config import JudgeConfig
from personaspace.store.errors import InputError

MESSAGE_TOKENS = 16
"""Of a chat template, for each message, at most."""
TEMPLATE_TOKENS = 64
"""Of a chat template, for each request, at most: a date and a system prompt of the template's own."""
BYTES_PER_TOKEN = 4.0
"""Of English text, where nothing was counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """What a model costs."""

    prompt: float
    """USD per million tokens of the prompt."""
    completion: float
    """USD per million tokens of the answer."""

    @classmethod
    def of(cls, config: JudgeConfig) -> "Prices | None":
        """The prices given, or None. Raises InputError for one without the other, or a budget without them."""
        given = (config.price_in, config.price_out)
        if (given[0] is None) != (given[1] is None):
            raise InputError("judge.price_in, judge.price_out: give both, or neither (USD per million tokens).")
        if given[0] is None or given[1] is None:
            if config.budget is not None:
                raise InputError(
                    f"judge.budget: {config.budget:g} USD can't be kept without prices. Give judge.price_in and "
                    "judge.price_out, in USD per million tokens; 0 for a server of your own."
                )
            return None
        return cls(prompt=given[0], completion=given[1])

    def usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


def text_bytes(messages: Sequence[Mapping[str, str]]) -> int:
    """UTF-8 bytes of what is said in the messages."""
    return sum(len(message["content"].encode()) for message in messages)


def most_tokens(messages: Sequence[Mapping[str, str]]) -> int:
    """Tokens that a prompt can have at most: a token of a byte-level vocabulary holds at least one byte."""
    return text_bytes(messages) + MESSAGE_TOKENS * len(messages) + TEMPLATE_TOKENS


class Purse:
    """What a session may spend, in USD. Whoever sends a request first reserves the most that it can cost.

    ``write_grant`` stores how much the session may have spent, before it can be spent: if the session is killed, the
    next one counts all of that as gone. So the budget holds whenever the process ends.
    """

    def __init__(self, budget: float | None, write_grant: Callable[[float], Awaitable[None]]) -> None:
        self._budget = budget
        self._write_grant = write_grant
        self._reserved = 0.0
        self._granting = asyncio.Lock()
        self._changed = asyncio.Event()
        self.spent = 0.0
        self.granted = 0.0
        self.is_empty = False
        """A request did not fit any more."""

    async def reserve(self, most: float, step: float) -> bool:
        """Set ``most`` aside, waiting while requests under way hold what may be left over. False if it is too much.

        ``step`` is how much is granted at a time.
        """
        if self._budget is None:
            return True
        while not self.is_empty:
            needed = self.spent + self._reserved + most
            if needed > self._budget:
                if self._reserved <= 1e-12:
                    self.is_empty = True
                    break
                self._changed.clear()
                await self._changed.wait()
            elif needed > self.granted:
                async with self._granting:
                    if needed > self.granted:
                        grant = min(self._budget, needed + step)
                        await self._write_grant(grant)
                        self.granted = grant
            else:
                self._reserved += most
                return True
        self._changed.set()
        return False

    def settle(self, most: float, usd: float) -> None:
        """Give back what was set aside, less what the request has cost."""
        if self._budget is not None:
            self._reserved = max(0.0, self._reserved - most)
        self.spent += usd
        self._changed.set()
