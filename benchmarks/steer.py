"""What capping costs: tokens per second with 8 of 30 layers capped, over those without, in turns.

    python benchmarks/steer.py --json out.json              # SmolLM2-135M (make demo fetches it)
    python benchmarks/steer.py --quick
    python benchmarks/steer.py --device cuda --random       # Llama 3.1 8B's shape

The thresholds lie below every projection, so that both give the same tokens: what a cap computes does not depend on
what it finds. Measured are static batches, one response at a time (as in a chat), and forward passes over finished
rollouts (as in extraction). `cap_overhead` is the median of the pairs' ratios, less 1, of static batches.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate import random_model
from machine import describe_machine
from ratios import ratio, show

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.demo_model import DEFAULT_FOLDER
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.hooks import LayerHook
from personaspace.extract.packing import form_batches
from personaspace.extract.personas import plan_personas
from personaspace.extract.precision import machine_dtype
from personaspace.extract.stage import Stage
from personaspace.steer.interventions import Intervention, layer_hooks

CAPPED = 8
"""Layers, as in the paper's Qwen 3 32B (of 64)."""
TOKEN_BUDGET = 4096


class Bench:
    """One model, capped and not."""

    def __init__(self, checkpoint: Checkpoint, model: Any, chat: ChatFormat, rows: int, config: GenerateConfig) -> None:
        self._checkpoint, self._config = checkpoint, config
        self._engine = TransformersEngine(model, chat, device=str(model.device))
        self._slice = self._engine.slice(checkpoint)
        plan = plan_personas(PersonasConfig(prompts=1), model_name=checkpoint.name, generation="benchmark")
        chosen = plan.rows[:: len(plan.rows) // rows][:rows]
        self._prompts = [chat.encode_prompt(row.messages) for row in chosen]
        self._seeds = [rollout_seed(0, row.rollout_id) for row in chosen]
        first = min(checkpoint.layers * 22 // 30, checkpoint.layers - CAPPED)
        draw = np.random.default_rng(0)
        self.hooks = layer_hooks(
            [
                Intervention(
                    method="cap",
                    layer=layer,
                    vector_D=draw.normal(size=checkpoint.hidden).astype(np.float32),
                    value=-1e9,
                )
                for layer in range(max(0, first), min(first + CAPPED, checkpoint.layers))
            ]
        )

    def batches(self, hooks: Sequence[LayerHook]) -> list[list[int]]:
        """Static batches of ``config.batch_rows``."""
        self._engine.intervene(self._checkpoint, hooks)
        size = self._config.batch_rows
        return [
            response.token_ids
            for start in range(0, len(self._prompts), size)
            for response in self._engine.generate(
                self._prompts[start : start + size], self._seeds[start : start + size], self._config
            )
        ]

    def alone(self, hooks: Sequence[LayerHook]) -> list[list[int]]:
        """The first two, one after the other."""
        self._engine.intervene(self._checkpoint, hooks)
        pairs = list(zip(self._prompts, self._seeds, strict=True))[:2]
        return [self._engine.generate([prompt], [seed], self._config)[0].token_ids for prompt, seed in pairs]

    def passes(self, hooks: Sequence[LayerHook]) -> int:
        """Forward passes over the prompts, each followed by as many random tokens as a response may have."""
        draw = random.Random(0)
        tokens = {
            row: (*prompt, *(draw.randrange(100, 1000) for _ in range(self._config.max_new_tokens)))
            for row, prompt in enumerate(self._prompts)
        }
        segments = {row: ((len(self._prompts[row]), len(ids)),) for row, ids in tokens.items()}
        with Stage(self._slice, hooks=hooks) as stage:
            for batch in form_batches(tokens, segments, TOKEN_BUDGET, packed=False):
                stage.forward(batch).pooled()
        return sum(map(len, tokens.values()))


def measure(work: Callable[[Sequence[LayerHook]], Any], hooks: Sequence[LayerHook], rounds: int) -> dict[str, Any]:
    """Seconds with and without, in pairs whose order alternates; both give the same."""
    took: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, Any] = {}
    work(())
    for number in range(rounds):
        for capped in (False, True) if number % 2 else (True, False):
            start = time.perf_counter()
            found[capped] = work(hooks if capped else ())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took[capped].append(time.perf_counter() - start)
    assert found[True] == found[False], "thresholds below all projections changed what was computed"
    made = found[True]
    tokens = made if isinstance(made, int) else sum(map(len, made))
    return {
        "capped_over_plain": ratio(took[True], took[False]),
        "tokens": tokens,
        "tokens_per_second": tokens / statistics.median(took[False]),
        "capped_tokens_per_second": tokens / statistics.median(took[True]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_FOLDER), help="folder of a chat model")
    parser.add_argument("--random", action="store_true", help="random weights of Llama 3.1 8B's shape")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rows", type=int, default=48, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="of a response, at most")
    parser.add_argument("--rounds", type=int, default=15, help="pairs")
    parser.add_argument("--quick", action="store_true", help="a few short responses, three pairs; with --random tiny")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    rows, tokens, rounds = (8, 12, 3) if arguments.quick else (arguments.rows, arguments.tokens, arguments.rounds)
    dtype = machine_dtype(arguments.device)
    config = ModelConfig(id=arguments.model, dtype=dtype)
    checkpoint = resolve(config)
    if arguments.random:
        checkpoint, model = random_model(checkpoint, dtype, arguments.device, quick=arguments.quick)
    else:
        model = load_causal_lm(checkpoint, dtype=dtype, device=arguments.device)
    bench = Bench(checkpoint, model, ChatFormat(checkpoint, config), rows, GenerateConfig(max_new_tokens=tokens))
    figures: dict[str, Any] = {"machine": describe_machine(Path(arguments.model).expanduser()), "dtype": dtype}
    for name, work in (("batches", bench.batches), ("alone", bench.alone), ("passes", bench.passes)):
        figures[name] = found = measure(work, bench.hooks, rounds)
        print(f"{name}: {found['tokens_per_second']:.0f} tokens/s, {found['capped_tokens_per_second']:.0f} capped")
        show(f"{name}: time capped over plain", found["capped_over_plain"])
    figures["cap_overhead"] = figures["batches"]["capped_over_plain"]["median"] - 1
    print(f"cap_overhead: {figures['cap_overhead']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
