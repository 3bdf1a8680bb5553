"""In vLLM's workers, through its public extension points: the residual stream read and changed while it decodes.

`InnerWorker` is mixed into the workers (`worker_extension_cls`) and called through `collective_rpc`. Forward hooks need
eager mode.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from personaspace.extract.generate.capture import SegmentTokens
from personaspace.extract.generate.vllm_capture import Sums
from personaspace.extract.generate.vllm_step import find_blocks, read_step, stream_of, with_stream
from personaspace.extract.hooks import LayerHook

COMPARED = {
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


class InnerWorker:
    """What a worker of vLLM can do besides: sum the states of the tokens of responses, and change states."""

    rank: int
    model_runner: Any

    def start_capture(self, layers: Sequence[int], blocks: int, segments: Sequence[tuple[int, int | None]]) -> None:
        """Once: read ``layers`` of ``blocks``. Every rank sees the whole stream, so that the first one is enough."""
        if self.rank == 0:
            tokens = [SegmentTokens(*segment) for segment in segments]
            self._capture = Sums(self.model_runner, layers, blocks, tokens)

    def begin_capture(self, longest: int, stop_ids: Sequence[int]) -> None:
        """A batch begins, whose responses have at most ``longest`` tokens and end before any of ``stop_ids``."""
        if self.rank == 0:
            self._capture.begin(longest, stop_ids)

    def end_capture(self) -> dict[int, tuple[NDArray[np.float32], int]]:
        """Row -> its sums ``(S, L, D)``, and how many tokens of its response were seen."""
        return self._capture.end() if self.rank == 0 else {}

    def intervene(self, hooks: Sequence[LayerHook], blocks: int) -> None:
        """Once, before `start_capture`: change the stream of a model of ``blocks``, on every rank alike."""
        _Changes(self.model_runner, hooks, blocks)


class _Changes:
    """Hooks at work in the model of a runner."""

    def __init__(self, runner: Any, hooks: Sequence[LayerHook], blocks: int) -> None:
        self._runner = runner
        self._response_N: torch.Tensor | None = None
        model = runner.get_model()
        if any(hook.positions == "response" for hook in hooks):
            model.register_forward_pre_hook(self._before_pass)
        found = find_blocks(model, blocks)
        for hook in hooks:
            found[hook.layer].register_forward_hook(self._changing(hook))

    def _before_pass(self, *_: Any) -> None:
        # Passes that only measure memory have no requests.
        token_N = read_step(self._runner).token_N if self._runner.input_batch.num_reqs else np.zeros(0, dtype=np.int64)
        self._response_N = torch.from_numpy(token_N >= 0).to(self._runner.device, non_blocking=True)

    def _changing(self, hook: LayerHook) -> Any:
        @torch.inference_mode()
        def change(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            stream_ND = stream_of(output)
            changed_ND = hook.change(stream_ND)
            if hook.positions == "response":
                assert self._response_N is not None
                # Behind the tokens of the step lies padding.
                own = len(self._response_N)
                changed_ND[:own] = torch.where(self._response_N[:, None], changed_ND[:own], stream_ND[:own])
            return with_stream(output, changed_ND)

        return change
