"""Cost of reading every layer on a GPU: an 8B-class Llama of random weights, packed micro-batches, all layers.

    python benchmarks/extract_gpu.py --json out.json           # one GPU; --attention sdpa without flash-attn
    python benchmarks/extract_gpu.py --quick --device cpu      # a tiny model: only shows that it runs

Prints ours over the bare pass on the same micro-batches, tokens/s, the share of the card's bfloat16 peak, and memory.
On CUDA any host sync between the first and the last block raises, through `torch.cuda.set_sync_debug_mode`.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlamaConfig

from personaspace.extract.anatomy import dissect
from personaspace.extract.packing import MicroBatch, form_batches
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import Slice
from personaspace.extract.stage import Stage

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {**LLAMA_8B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""bfloat16, dense, by the makers' data sheets."""
PROMPT_TOKENS = 60


def build(config: dict[str, Any], device: str, attention: str) -> Slice:
    """The whole model, random weights made on the device."""
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModel.from_config(LlamaConfig(**config), attn_implementation=attention)
        torch.set_default_dtype(torch.float32)
    parts = dissect(model.eval(), config["num_hidden_layers"])
    return Slice(
        first=0,
        stop=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        dtype=torch.bfloat16,
        device=torch.device(device),
        decoder=parts.decoder,
        blocks=parts.blocks,
        compiled=False,
    )


def make_batches(rows: int, budget: int, vocabulary: int) -> list[MicroBatch]:
    """Packed micro-batches of rollouts with lognormal lengths, median 250, up to 2,048."""
    draw = random.Random(0)
    lengths = [min(2048, max(PROMPT_TOKENS + 20, round(draw.lognormvariate(5.52, 0.6)))) for _ in range(rows)]
    return form_batches(
        {row: tuple(draw.choices(range(vocabulary), k=length)) for row, length in enumerate(lengths)},
        {row: ((PROMPT_TOKENS, length),) for row, length in enumerate(lengths)},
        budget,
        packed=True,
    )


def forbid_syncs(blocks: nn.ModuleList) -> None:
    """Make any host sync inside the layer loop an error."""
    blocks[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    blocks[len(blocks) - 1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))


def seconds(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", default="flash_attention_2", help="kernels, by transformers' names")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 pairs")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    config = TINY if arguments.quick else LLAMA_8B
    pairs = 2 if arguments.quick else arguments.pairs
    attention = "sdpa" if arguments.device == "cpu" else arguments.attention
    model = build(config, arguments.device, attention)
    with Stage(model) as stage:
        check_stage(stage, packed=True)
    batches = make_batches(16 if arguments.quick else 512, arguments.tokens, config["vocab_size"])
    is_cuda = model.device.type == "cuda"
    if is_cuda:
        forbid_syncs(model.blocks)
        torch.cuda.reset_peak_memory_stats()
    loaded = torch.cuda.memory_allocated() if is_cuda else 0

    def ours() -> None:
        with Stage(model) as stage:
            outputs = [stage.forward(batch) for batch in batches]
            for output in outputs:
                output.pooled()

    def bare() -> None:
        # The same engine that reads nothing is the bare pass.
        with Stage(model, layers=()) as stage:
            for batch in batches:
                stage.forward(batch)

    times: dict[str, list[float]] = {"ours": [], "bare": []}
    draw = random.Random(1)
    for pair in range(-1, pairs):
        for name, work in draw.sample([("ours", ours), ("bare", bare)], 2):
            taken = seconds(work, model.device)
            if pair >= 0:  # The first pair warms up.
                times[name].append(taken)
    tokens = sum(batch.tokens for batch in batches)
    weights = sum(parameter.numel() for block in model.blocks for parameter in block.parameters())
    squares = sum(length**2 for batch in batches for length in batch.lengths)
    # Causal attention: half of the products of all pairs of tokens, for scores and for values.
    flops = 2 * weights * tokens + 2 * squares * config["hidden_size"] * config["num_hidden_layers"]
    name = torch.cuda.get_device_name() if is_cuda else "cpu"
    peak = next((flops_per_s for card, flops_per_s in PEAK_FLOPS.items() if card in name), None)
    rate = 1 / statistics.median(times["ours"])
    figures = {
        "device": name,
        "attention": attention,
        "torch": torch.__version__,
        "parameters_of_blocks": weights,
        "micro_batches": len(batches),
        "tokens": tokens,
        "ours_over_bare": statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True)),
        "tokens_per_s": tokens * rate,
        "share_of_peak": flops * rate / peak if peak else None,
        "syncs_in_layer_loop": 0 if is_cuda else None,
        "extra_peak_bytes": torch.cuda.max_memory_allocated() - loaded if is_cuda else None,
        "seconds": times,
    }
    for key, value in figures.items():
        if key != "seconds":
            print(f"{key}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
