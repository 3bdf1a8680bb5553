"""Activations taken while generating, so that no second pass is needed.

To sample the next token, decoding runs every response token through all blocks once, with the states that a replay of
the finished rollout gives, up to rounding. They are summed as they pass. (The engine samples one token more than a
response may have, so that the last one passes, too.)

Shape suffixes: B rows of the batch, T tokens, Z sites, L layers, S segments (one for each reduction), D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personaspace.extract.anatomy import states_of
from personaspace.extract.config import GenerateConfig
from personaspace.extract.pooling import HostCopy, Pooled
from personaspace.extract.reductions import Readout, token_range
from personaspace.extract.sites import INNER_SITES, Addition, find_additions
from personaspace.extract.slicing import Slice
from personaspace.store.errors import InputError

_PROBE = 6
"""Tokens."""


def check_capturable(readout: Readout, config: GenerateConfig) -> None:
    """Raise InputError for what can't be read while generating: parts of turns are known only afterwards."""
    if config.engine == "vllm" and readout.sites != ("resid_post",):
        raise InputError(
            f"generate.capture: of vLLM's models only resid_post can be read, and extract.sites has "
            f"{', '.join(readout.sites)}. Leave generate.capture out, or use generate.engine transformers."
        )
    if config.batching != "static":
        raise InputError("generate.capture: only with static batching. Leave one of the two out.")
    if readout.parts:
        raise InputError(
            "generate.capture: the reductions `turns` and `parts` need finished responses. Leave generate.capture out, "
            "or read only `mean`, `last_prompt` and `first_K`."
        )


@dataclass(frozen=True, slots=True)
class SegmentTokens:
    """Those that a segment sums, counted from the response's first one: ``[first, stop)``."""

    first: int
    stop: int | None
    """None: up to the last one."""

    def holds(self, token: Any) -> Any:
        """Whether it sums a token, or for an array of tokens which of them."""
        return (token >= self.first) & (self.stop is None or token < self.stop)

    def count(self, length: int) -> int:
        """How many there are in a response of so many tokens."""
        return (length if self.stop is None else min(self.stop, length)) - self.first


class Capture:
    """Sums of a model's states at ``readout``'s sites of ``layers``, for one batch after another.

    `begin` a batch, `step` after each forward pass of it, `finish` when its responses are known. ``stop_ids`` end a
    turn. Stop strings show only in the text, when some of their tokens are summed already; ``remembered`` is how many
    of each row's last tokens can be taken back.
    """

    def __init__(
        self, model: Slice, readout: Readout, layers: Sequence[int], *, stop_ids: Sequence[int], remembered: int = 0
    ) -> None:
        self._model, self._readout, self._layers = model, readout, tuple(layers)
        self._tokens = [SegmentTokens(*token_range(name)) for name in readout.reductions]
        self._stop_ids, self._remembered = list(stop_ids), remembered
        self._latest_ZLBD: torch.Tensor | None = None
        self._register()

    def begin(self, rows: int, prompt_length: int) -> None:
        """A batch of so many rows is about to be decoded, whose prompts end in the same column."""
        model, self._prompt_length = self._model, prompt_length
        shape = (len(self._readout.sites), len(self._layers), rows, model.hidden)
        self._latest_ZLBD = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._recent_RZLBD = torch.zeros((self._remembered, *shape), dtype=model.dtype, device=model.device)
        self._sums_SZLBD = torch.zeros((len(self._tokens), *shape), dtype=torch.float32, device=model.device)
        self._summed_B = torch.zeros(rows, dtype=torch.long, device=model.device)
        self._active_B = torch.ones(rows, dtype=torch.bool, device=model.device)
        self._stops = torch.tensor(self._stop_ids, dtype=torch.long, device=model.device)

    @torch.inference_mode()
    def step(self, ids_BT: torch.Tensor) -> None:
        """A forward pass is over: of the prompts, or of the last token of ``ids_BT``. Without a host sync."""
        assert self._latest_ZLBD is not None
        token = ids_BT.shape[1] - self._prompt_length - 1
        active_B1 = self._active_B[:, None]
        if token >= 0:
            self._active_B &= ~torch.isin(ids_BT[:, -1].to(self._stops.device), self._stops)
            self._summed_B += self._active_B
            # What a finished row gives may be anything: 0 * inf is NaN.
            self._latest_ZLBD.masked_fill_(~active_B1, 0)
        for segment, tokens in enumerate(self._tokens):
            if tokens.holds(token):
                self._sums_SZLBD[segment].add_(self._latest_ZLBD)
        if self._remembered and token >= 0:
            recent_ZLBD = self._recent_RZLBD[token % self._remembered]
            torch.where(active_B1, self._latest_ZLBD, recent_ZLBD, out=recent_ZLBD)

    def finish(self, lengths: Sequence[int]) -> list[Pooled | None]:
        """Each row's sums ``(Z, L, S, D)``, given how many tokens its response has; None if not just those were seen.

        Waits for the device.
        """
        assert self._latest_ZLBD is not None
        summed = self._summed_B.tolist()
        for row, (seen, length) in enumerate(zip(summed, lengths, strict=True)):
            if 0 < seen - length <= self._remembered:
                for token in range(length, seen):
                    self._take_back(row, token)
                summed[row] = length
        sums_SZLBD = HostCopy(self._sums_SZLBD).numpy()
        self._latest_ZLBD = None
        counts = [torch.tensor([tokens.count(length) for tokens in self._tokens]).numpy() for length in lengths]
        return [
            Pooled(sums_SD=sums_SZLBD[:, :, :, row].transpose(1, 2, 0, 3).copy(), counts_S=counts[row])
            if summed[row] == lengths[row]
            else None
            for row in range(len(lengths))
        ]

    def _take_back(self, row: int, token: int) -> None:
        for segment, tokens in enumerate(self._tokens):
            if tokens.holds(token):
                self._sums_SZLBD[segment][:, :, row] -= self._recent_RZLBD[token % self._remembered][:, :, row]

    def _register(self) -> None:
        blocks = {layer: self._model.blocks[layer] for layer in self._layers}
        additions = {}
        if set(INNER_SITES) & set(self._readout.sites):
            ids_BT = torch.arange(_PROBE, device=self._model.device)[None]
            additions = find_additions(blocks, lambda: self._model.decoder(input_ids=ids_BT, use_cache=False))
        for number, layer in enumerate(self._layers):
            for place, site in enumerate(self._readout.sites):
                if site == "resid_pre":
                    blocks[layer].register_forward_pre_hook(self._before(place, number), with_kwargs=True)
                else:
                    addition = additions.get((layer, site))
                    read = blocks[layer] if addition is None else addition.module
                    read.register_forward_hook(self._after(place, number, addition))

    def _before(self, place: int, number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(place, number, args[0] if args else kwargs["hidden_states"])

        return hook

    def _after(self, place: int, number: int, addition: Addition | None) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._take(place, number, states_of(output), 1.0 if addition is None else addition.scale)

        return hook

    def _take(self, place: int, number: int, states_BTD: torch.Tensor, scale: float = 1.0) -> None:
        if self._latest_ZLBD is not None:
            latest_BD = self._latest_ZLBD[place, number].copy_(states_BTD[:, -1])
            if scale != 1.0:
                latest_BD.mul_(scale)
