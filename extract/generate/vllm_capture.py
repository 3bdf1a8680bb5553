"""Residual streams summed inside vLLM while it decodes.

Shape suffixes: N tokens of a step, S segments (one for each reduction), L layers, R requests at once, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from personaspace.extract.generate.capture import SegmentTokens
from personaspace.extract.generate.vllm_step import find_blocks, read_step, stream_of


class Sums:
    """Sums of the requests that are on their way, on the device; of others, on the host."""

    def __init__(self, runner: Any, layers: Sequence[int], blocks: int, segments: Sequence[SegmentTokens]) -> None:
        self._runner, self._segments, self._active = runner, tuple(segments), False
        model = runner.get_model()
        config = runner.vllm_config.model_config
        slots = runner.vllm_config.scheduler_config.max_num_seqs
        shape = (len(segments), len(layers), slots, config.get_hidden_size())
        self._sums_SLRD = torch.zeros(shape, dtype=torch.float32, device=runner.device)
        self._seen_R = torch.zeros(slots, dtype=torch.long, device=runner.device)
        self._slots: dict[int, int] = {}
        self._free = list(range(slots))
        self._aside: dict[int, tuple[torch.Tensor, int]] = {}
        model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        found = find_blocks(model, blocks)
        for number, layer in enumerate(layers):
            found[layer].register_forward_hook(self._after(number))

    def begin(self, longest: int, stop_ids: Sequence[int]) -> None:
        self._longest, self._active = longest, True
        self._stops = torch.tensor(list(stop_ids), dtype=torch.long, device=self._sums_SLRD.device)

    def end(self) -> dict[int, tuple[NDArray[np.float32], int]]:
        self._keep_only(())
        self._active, aside, self._aside = False, self._aside, {}
        return {row: (sums_SLD.numpy(), seen) for row, (sums_SLD, seen) in aside.items()}

    @torch.inference_mode()
    def _before_pass(self, _: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Find out which tokens of the step belong to responses, and to which segments."""
        if not self._active:
            return
        step = read_step(self._runner)
        self._keep_only(step.row_R)
        slots, token = np.array([self._slot(row) for row in step.row_R]), step.token_N
        wanted = (token >= min(0, *(segment.first for segment in self._segments))) & (token < self._longest)
        place, token = np.flatnonzero(wanted), token[wanted]
        device = self._sums_SLRD.device
        self._place_N = torch.from_numpy(place).to(device, non_blocking=True)
        self._slot_N = torch.from_numpy(np.repeat(slots, step.length_R)[wanted]).to(device, non_blocking=True)
        # What is sampled may be known on the device alone. Prompts hold end-of-turn tokens, too.
        response_N = torch.from_numpy(token >= 0).to(device, non_blocking=True)
        ended_N = response_N & torch.isin(arguments["input_ids"][self._place_N].long(), self._stops)
        self._seen_R.index_add_(0, self._slot_N, (response_N & ~ended_N).long())
        held_SN = np.stack([segment.holds(token) for segment in self._segments])
        self._counted_SN = torch.from_numpy(held_SN).to(device, non_blocking=True) & ~ended_N

    def _after(self, number: int) -> Any:
        @torch.inference_mode()
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            if not self._active or not len(self._place_N):
                return
            states_ND = stream_of(output)[self._place_N].float()
            for segment, counted_N in enumerate(self._counted_SN):
                # What follows an end may be anything: 0 * inf is NaN.
                counted_ND = states_ND.masked_fill(~counted_N[:, None], 0)
                self._sums_SLRD[segment, number].index_add_(0, self._slot_N, counted_ND)

        return hook

    def _slot(self, row: int) -> int:
        if row not in self._slots:
            slot = self._slots[row] = self._free.pop()
            sums_SLD, seen = self._aside.pop(row, (0.0, 0))
            self._sums_SLRD[:, :, slot] = sums_SLD
            self._seen_R[slot] = seen
        return self._slots[row]

    def _keep_only(self, rows: Sequence[int]) -> None:
        """Put away the sums of requests that are done, or wait for their turn."""
        for row in self._slots.keys() - set(rows):
            slot = self._slots.pop(row)
            self._aside[row] = (self._sums_SLRD[:, :, slot].to("cpu", copy=True), int(self._seen_R[slot]))
            self._free.append(slot)
