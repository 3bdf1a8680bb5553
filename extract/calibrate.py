"""What a CPU core does with a model: two sizes of it with random weights, timed for a few seconds.

A table of peaks says little of CPUs, where norms, rotary tables, caches and sampling take as long as the products. So a
few of the model's own blocks run as they will in the job, and the time of all layers follows from the difference of two
depths: a step costs ``fixed + layers x per_layer``. One thread is timed by its own clock, so that other work on the
machine counts little; that cores add up is assumed.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from personaspace.extract.config import Dtype
from personaspace.extract.generate.noise import GumbelTopP

DEPTHS = (1, 5)
"""Layers of the two models that are timed."""
STEPS = 14
"""Decoding steps, whose median is taken."""
REPEATS = 3
COLD = 0.01
"""Temperature. To random weights all tokens are nearly alike, and a nucleus of all would take far longer to find than
that of a trained model."""
PATIENCE = 3.0
"""Seconds after which one figure is not repeated again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Seconds of one core."""

    forward_seconds: float
    """Of one micro-batch through all layers."""
    forward_tokens: int
    """Tokens of that micro-batch."""
    step_seconds: float
    """Of one decoding step of all layers, the head and sampling."""


def calibrate(
    config: Any,
    layers: int,
    dtype: Dtype,
    *,
    micro_batch: tuple[int, int],
    decode_rows: int,
    context: int,
) -> Calibration:
    """Time the model that ``config`` (transformers') describes; ``micro_batch`` is (rows, tokens) of a forward pass.

    ``context`` is how many tokens lie behind each of the ``decode_rows`` on average. Takes some seconds for models that
    CPUs can run; thread count and random state are as before afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models = {depth: _shallow(config, depth, dtype) for depth in DEPTHS}
            forward = {depth: _forward(model, *micro_batch) for depth, model in models.items()}
            step = {depth: _step(model, decode_rows, context) for depth, model in models.items()}
    finally:
        torch.set_num_threads(before)
    return Calibration(
        forward_seconds=_extrapolate(forward, layers),
        forward_tokens=micro_batch[0] * micro_batch[1],
        step_seconds=_extrapolate(step, layers),
    )


def _extrapolate(seconds: dict[int, float], layers: int) -> float:
    shallow, deep = DEPTHS
    # Noise must not make a layer free.
    per_layer = max((seconds[deep] - seconds[shallow]) / (deep - shallow), seconds[deep] / deep / 10)
    return seconds[shallow] + (layers - shallow) * per_layer


def _shallow(config: Any, depth: int, dtype: Dtype) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def _forward(model: Any, rows: int, tokens: int) -> float:
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (rows, tokens))
    return _best(lambda: model.get_decoder()(input_ids=ids_BT, use_cache=False))


@torch.inference_mode()
def _step(model: Any, rows: int, context: int) -> float:
    ids_BT = torch.randint(model.config.get_text_config().vocab_size, (rows, context))
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    clock = _Clock()
    sampler = GumbelTopP(list(range(rows)), temperature=COLD, top_p=0.9, prompt_length=context)
    model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=STEPS,
        logits_processor=LogitsProcessorList([sampler, clock]),
    )
    # The first one follows the pass over the prompts.
    return statistics.median(stop - start for start, stop in pairwise(clock.times[1:]))


class _Clock(LogitsProcessor):
    """Notes when each decoding step has its scores, and changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.thread_time())
        return scores


def _best(work: Callable[[], object]) -> float:
    """Shortest of some runs, after one to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
        if sum(seconds) > PATIENCE:
            break
    return min(seconds)
