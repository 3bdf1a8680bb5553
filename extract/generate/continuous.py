"""Continuous batching with transformers: a response that is finished makes room for the next at once.

Sampling is that of noise.py, so in float32 the responses are those of static batches. Shape suffixes: B requests that
get a token, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate.noise import noisy
from personaspace.store.errors import WorkerError

PAGE = 32
"""Tokens of a page of the cache, on a CPU."""
PREFILL = 2048
"""Tokens of prompts that enter a pass on a CPU, at most."""
_STEP_BITS = 16
_ROWS = 1 << (31 - _STEP_BITS)


def sample_continuously(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: GenerateConfig,
    generation: GenerationConfig,
) -> list[list[int]]:
    """Sampled token ids of each prompt, up to its end-of-turn token or ``config.max_new_tokens``.

    On GPUs as many run at once as their memory holds; on CPUs all. Raises WorkerError for requests that failed.
    """
    if len(prompts) > _ROWS:
        raise WorkerError(f"generate.batch_rows: {len(prompts)} rollouts at once; continuous batching takes {_ROWS}.")
    sampler = _Sampler({str(row): (row, len(prompt)) for row, prompt in enumerate(prompts)}, seeds, config)
    manager = model.init_continuous_batching(generation, _batching(model.device, prompts, config.max_new_tokens))
    # transformers has no other way in for a processor of one's own that tells requests apart.
    manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
    manager.logit_processor.tensors_required = 1
    manager.start()
    finished: dict[str, Any] = {}
    try:
        for row, prompt in enumerate(prompts):
            manager.add_request(list(prompt), request_id=str(row), max_new_tokens=config.max_new_tokens)
        while len(finished) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                finished[result.request_id] = result
            elif result is None and not manager.is_running():
                raise WorkerError("transformers' continuous batching ended before its requests did.")
    finally:
        manager.stop(block=True)
    failed = {name: result.error for name, result in finished.items() if result.error is not None}
    if failed:
        name, error = next(iter(failed.items()))
        raise WorkerError(f"{len(failed)} of {len(prompts)} requests failed, such as number {name}: {error}")
    return [list(finished[str(row)].generated_tokens) for row in range(len(prompts))]


def _batching(device: torch.device, prompts: Sequence[Sequence[int]], new_tokens: int) -> ContinuousBatchingConfig:
    # The nucleus widens until it is whole, which no CUDA graph can do.
    plain = {"use_async_batching": False, "use_cuda_graph": False}
    if device.type != "cpu":
        return ContinuousBatchingConfig(**plain)
    longest = max(map(len, prompts)) + new_tokens
    return ContinuousBatchingConfig(
        **plain,
        page_size=PAGE,
        num_blocks=len(prompts) * (longest // PAGE + 1),
        max_batch_tokens=max(PREFILL, len(prompts)),
        max_requests_per_batch=len(prompts),
    )


class _Sampler(ContinuousBatchingLogitsProcessor):
    """Draws each request's token by its own seed and step. ``requests``: id -> (row, tokens of its prompt)."""

    supported_kwargs: Mapping[str, type] = {}
    ignored_kwargs = ()

    def __init__(self, requests: Mapping[str, tuple[int, int]], seeds: Sequence[int], config: GenerateConfig) -> None:
        self._requests, self._config = requests, config
        self._seeds = torch.tensor(list(seeds), dtype=torch.int64)

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """For places without a request."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """Row and step of each request, in one number."""
        packed = []
        for request in requests_with_new_token:
            row, prompt_length = self._requests[request.state.request_id]
            packed.append(row << _STEP_BITS | (request.state.position_offset - prompt_length))
        return torch.tensor(packed, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, V)`` whose argmax is the sampled token."""
        packed_B = tensor_arg[: len(scores)].long()
        seed_B = self._seeds.to(scores.device)[packed_B >> _STEP_BITS]
        step_B = packed_B & ((1 << _STEP_BITS) - 1)
        config = self._config
        return noisy(scores, seed_B, step_B, temperature=config.temperature, top_p=config.top_p)
