"""Cost of capturing every layer: our stage over the bare backbone pass, on the same micro-batches.

    python benchmarks/extract.py                  # SmolLM2-135M (make demo fetches it), 20 pairs
    python benchmarks/extract.py --quick --json out.json

Each pair runs both in random order on one micro-batch; the median of the ratios is what counts, since machines are
noisy. The bare pass is the same backbone without hooks, padding to the right, without a mask.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel

from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import ModelConfig
from personaspace.extract.demo_model import DEFAULT_FOLDER
from personaspace.extract.packing import MicroBatch, batch_by_length
from personaspace.extract.stage import Stage

PROMPT_TOKENS = 60
BUDGET = 4096


def make_batches(generator: random.Random, rows: int, vocabulary: int) -> list[MicroBatch]:
    """Micro-batches of random tokens: a prompt of 60 tokens, responses lognormal around 160, up to 512."""
    responses = {row: min(512, max(1, round(generator.lognormvariate(5.0, 0.5)))) for row in range(rows)}
    lengths = {row: PROMPT_TOKENS + tokens for row, tokens in responses.items()}
    return [
        MicroBatch(
            rows=batch,
            token_ids=tuple(tuple(generator.choices(range(vocabulary), k=lengths[row])) for row in batch),
            spans=tuple((PROMPT_TOKENS, lengths[row]) for row in batch),
        )
        for batch in batch_by_length(lengths, BUDGET)
    ]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_FOLDER), help="checkpoint folder or Hugging Face id")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="3 pairs on short batches")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    generator = random.Random(0)
    checkpoint = resolve(ModelConfig(id=arguments.model))
    stage = Stage(checkpoint, first=0, stop=checkpoint.layers, dtype="bfloat16")
    bare = AutoModel.from_pretrained(checkpoint.source, dtype=torch.bfloat16, **checkpoint.loading()).eval()
    batches = make_batches(generator, 24 if arguments.quick else 120, bare.config.vocab_size)

    @torch.inference_mode()
    def bare_pass(batch: MicroBatch) -> None:
        ids = torch.zeros((len(batch.rows), batch.padded_length), dtype=torch.long)
        for row, tokens in enumerate(batch.token_ids):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        bare(input_ids=ids, use_cache=False)

    ratios, rates = [], []
    for pair in range(-1, 3 if arguments.quick else arguments.pairs):
        batch = batches[pair % len(batches)]
        times = {}
        for name in generator.sample(["ours", "bare"], 2):
            run = bare_pass if name == "bare" else stage.forward
            times[name] = seconds(lambda run=run, batch=batch: run(batch))  # type: ignore[misc]
        if pair >= 0:  # The first pair warms up.
            ratios.append(times["ours"] / times["bare"])
            rates.append(batch.tokens / times["ours"])
    low, _, high = statistics.quantiles(ratios, n=4)
    figures = {
        "ours_over_bare": statistics.median(ratios),
        "ours_over_bare_quartiles": [low, high],
        "tokens_per_s": statistics.median(rates),
        "pairs": len(ratios),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(f"ours over the bare pass: median {figures['ours_over_bare']:.3f}, quartiles {low:.3f} to {high:.3f}")
    print(f"tokens/s: {figures['tokens_per_s']:,.0f} with {figures['threads']} threads, {len(ratios)} pairs")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
