"""Which tokens of a step of vLLM's are whose, and where its models keep the residual stream.

Which rollout a request is, and where its response begins, travels in `SamplingParams.extra_args`. Not public, and so
bound to the pinned version: how vLLM's model runner says which tokens of a flat batch are whose.

Shape suffixes: N tokens of a step, R requests in it, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

ROW, PROMPT = "personaspace_row", "personaspace_prompt_tokens"
"""Names in `extra_args`: the rollout's place in the batch, and the tokens before its response."""


def requested(row: int, prompt_tokens: int) -> Mapping[str, int]:
    """`extra_args` of a request."""
    return {ROW: row, PROMPT: prompt_tokens}


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The requests that a step goes on with."""

    row_R: list[int]
    length_R: NDArray[np.int64]
    """Tokens of each in this step."""
    token_N: NDArray[np.int64]
    """Place of each token in its response; below 0 in the prompt."""


def read_step(runner: Any) -> Step:
    """What the runner is about to run."""
    batch = runner.input_batch
    count = batch.num_reqs
    told = [runner.requests[name].sampling_params.extra_args for name in batch.req_ids[:count]]
    starts = runner.query_start_loc.np[: count + 1].astype(np.int64)
    length_R = np.diff(starts)
    within_N = np.arange(starts[-1]) - np.repeat(starts[:-1], length_R)
    position_N = np.repeat(batch.num_computed_tokens_cpu[:count], length_R) + within_N
    token_N = position_N - np.repeat([args[PROMPT] for args in told], length_R)
    return Step(row_R=[args[ROW] for args in told], length_R=length_R, token_N=token_N)


def stream_of(output: Any) -> torch.Tensor:
    """The residual stream ``(N, D)`` in what a block hands on: itself, or its last addition and all before."""
    stream_ND: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0] + output[1]
    return stream_ND


def with_stream(output: Any, stream_ND: torch.Tensor) -> Any:
    """What a block hands on, with another residual stream."""
    return stream_ND if isinstance(output, torch.Tensor) else (stream_ND - output[1], *output[1:])


def find_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The model's blocks: the list of so many that lies outermost."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"vLLM's {type(model).__name__} has no list of {count} blocks")
