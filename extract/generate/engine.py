"""What every engine does: token ids in, token ids out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import GenerateConfig
from personaspace.extract.hooks import LayerHook
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import Readout

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended its turn; `length`: it was cut off at `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """A sampled response."""

    token_ids: list[int]
    """Without the end-of-turn token."""
    text: str
    finish_reason: FinishReason
    unusable: str | None = None
    """Why the rollout has to be dropped, though the engine works: a server's answer that can't be read, for example."""


Captured = tuple[Response, Pooled | None]
"""A response and its sums ``(Z, L, S, D)``; None where not just its own tokens could be summed."""


class Engine(Protocol):
    """A model that samples responses."""

    maker: str | None
    """What samples, to be kept with the responses; None where the session's versions in run.json say it."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Response]:
        """One response for each prompt (token ids), in order, each sampled with its own seed (63 bits).

        ``config`` gives temperature, top-p and the longest response. The same prompt, seed and config give the same
        response as far as the engine can promise it; each engine says how far that is.
        """


class InnerEngine(Engine, Protocol):
    """An engine that can read and change activations while it samples: its model is in its own hands."""

    def intervene(self, checkpoint: Checkpoint, hooks: Sequence[LayerHook]) -> None:
        """From now on, change the residual stream so, in `generate`, `generate_captured` and `replay`.

        What is captured is captured behind the changes. Raises InputError for a model that can't be changed so.
        """

    def capture(self, checkpoint: Checkpoint, readout: Readout, layers: Sequence[int]) -> None:
        """From now on, read ``layers`` while generating. Raises InputError for what can't be read so."""

    def generate_captured(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Captured]:
        """As `generate`, with what `capture` asked for."""

    def replay(self, sampled: Mapping[int, tuple[Sequence[int], Response]]) -> dict[int, Pooled]:
        """Row -> the same sums from a forward pass over the finished rollout, given its prompt and response."""
