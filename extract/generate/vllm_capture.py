"""In vLLM's workers: residual streams summed while it decodes, through its public extension points.

`CaptureWorker` is mixed into the workers (`worker_extension_cls`) and called through `collective_rpc`; which rollout a
request is, and where its response begins, travels in `SamplingParams.extra_args`. Forward hooks need eager mode. Not
public, and so bound to the pinned version: how vLLM's model runner says which tokens of a flat batch are whose.

Shape suffixes: N tokens of a step, S segments (one for each reduction), L layers, R requests at once, D hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from personaspace.extract.generate.capture import SegmentTokens

CAPTURABLE = {
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
}
"""Architectures whose blocks were compared with those of transformers (tests/extract/generate/test_vllm_capture.py):
what a block hands on, vLLM's models are free to split as they like."""
ROW, PROMPT = "personaspace_row", "personaspace_prompt_tokens"
"""Names in `extra_args`: the rollout's place in the batch, and the tokens before its response."""


class CaptureWorker:
    """What a worker of vLLM can do besides: sum the states of the tokens of responses."""

    rank: int
    model_runner: Any

    def start_capture(self, layers: Sequence[int], blocks: int, segments: Sequence[tuple[int, int | None]]) -> None:
        """Once: read ``layers`` of ``blocks``. Every rank sees the whole stream, so that the first one is enough."""
        if self.rank == 0:
            tokens = [SegmentTokens(*segment) for segment in segments]
            self._capture = _Sums(self.model_runner, layers, blocks, tokens)

    def begin_capture(self, longest: int, stop_ids: Sequence[int]) -> None:
        """A batch begins, whose responses have at most ``longest`` tokens and end before any of ``stop_ids``."""
        if self.rank == 0:
            self._capture.begin(longest, stop_ids)

    def end_capture(self) -> dict[int, tuple[NDArray[np.float32], int]]:
        """Row -> its sums ``(S, L, D)``, and how many tokens of its response were seen."""
        return self._capture.end() if self.rank == 0 else {}


class _Sums:
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
        found = _find_blocks(model, blocks)
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
        batch = self._runner.input_batch
        count = batch.num_reqs
        told = [self._runner.requests[name].sampling_params.extra_args for name in batch.req_ids[:count]]
        rows = [args[ROW] for args in told]
        self._keep_only(rows)
        slots = np.array([self._slot(row) for row in rows])
        starts = self._runner.query_start_loc.np[: count + 1].astype(np.int64)
        lengths = np.diff(starts)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        position = np.repeat(batch.num_computed_tokens_cpu[:count], lengths) + within
        token = position - np.repeat([args[PROMPT] for args in told], lengths)
        wanted = (token >= min(0, *(segment.first for segment in self._segments))) & (token < self._longest)
        place, token = np.flatnonzero(wanted), token[wanted]
        device = self._sums_SLRD.device
        self._place_N = torch.from_numpy(place).to(device, non_blocking=True)
        self._slot_N = torch.from_numpy(np.repeat(slots, lengths)[wanted]).to(device, non_blocking=True)
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
            states_ND = _stream(output)[self._place_N].float()
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


def _stream(output: Any) -> torch.Tensor:
    """The residual stream ``(N, D)`` in what a block hands on: itself, or its last addition and all before."""
    stream_ND: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0] + output[1]
    return stream_ND


def _find_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The model's blocks: the list of so many that lies outermost."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"vLLM's {type(model).__name__} has no list of {count} blocks")


def requested(row: int, prompt_tokens: int) -> Mapping[str, int]:
    """`extra_args` of a request."""
    return {ROW: row, PROMPT: prompt_tokens}
