"""What this machine does with a model: two sizes of it with random weights, timed for a few seconds.

A table of peaks says little of CPUs, where norms, rotary tables, caches and sampling take as long as the products. So a
few of the model's own blocks run as they will in the job, and the time of all layers follows from the difference of two
depths: a step costs ``fixed + layers x per_layer``.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from personaspace.extract.config import Dtype
from personaspace.extract.generate.noise import GumbelTopP

DEPTHS = (1, 3)
"""Layers of the two models that are timed."""
STEPS = (2, 6)
"""Decoding steps whose difference is timed."""
REPEATS = 3
PATIENCE = 3.0
"""Seconds after which one figure is not repeated again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Seconds on this machine, with all of the given threads."""

    forward_seconds: float
    """Of one micro-batch through all layers."""
    forward_tokens: int
    """Tokens of that micro-batch."""
    step_seconds: float
    """Of one decoding step of all layers, the head and sampling."""
    threads: int


def calibrate(
    config: Any,
    layers: int,
    dtype: Dtype,
    *,
    micro_batch: tuple[int, int],
    decode_rows: int,
    context: int,
    threads: int,
) -> Calibration:
    """Time the model that ``config`` (transformers') describes; ``micro_batch`` is (rows, tokens) of a forward pass.

    ``context`` is how many tokens lie behind each of the ``decode_rows`` on average. Takes some seconds for models that
    CPUs can run; thread count and random state are as before afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
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
        threads=threads,
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
    mask_BT = torch.ones_like(ids_BT)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)

    def generate(steps: int) -> None:
        sampler = GumbelTopP(list(range(rows)), temperature=0.7, top_p=0.9, prompt_length=context)
        model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=steps,
            logits_processor=LogitsProcessorList([sampler]),
        )

    few, many = STEPS
    return (_best(lambda: generate(many)) - _best(lambda: generate(few))) / (many - few)


def _best(work: Callable[[], object]) -> float:
    """Shortest of some runs, after one to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > PATIENCE:
            break
    return min(seconds)
