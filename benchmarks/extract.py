"""Cost of reading every layer: our engine against its limit, the bare forward pass, and against other ways.

    python benchmarks/extract.py                         # SmolLM2-135M (make demo fetches it); an hour on two cores
    python benchmarks/extract.py --quick --json out.json

Two mixes of rollouts: `parity` (--responses: assistant-axis JSONL files) and `lognormal` (random tokens, median 250, up
to 2,048). In each pair all methods run over the whole mix, in random order; medians of the ratios count, with 95%
intervals, since machines are noisy. `ours`, `compiled` (ours with extract.compile) and `bare` see the same
micro-batches, the others batches of 16 in the order in which the rollouts come.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from extract_cluster import RESPONSES, measure_cluster
from extract_memory import measure_memory
from extract_methods import Tokens, bare, given_order, hidden_states, make_batches, ours, reference
from machine import describe_machine
from ratios import ratio, show

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import ExtractConfig, ModelConfig
from personaspace.extract.demo_model import DEFAULT_FOLDER
from personaspace.extract.packing import MicroBatch, padding_waste
from personaspace.extract.spans import locate
from personaspace.store.formats.assistant_axis import read_responses

BUDGET = 4096
PROMPT_TOKENS = 60
METHODS: Mapping[str, Callable[..., Any]] = {
    "ours": ours,
    "compiled": partial(ours, compiled=True),
    "bare": bare,
    "hidden_states": hidden_states,
    "reference": reference,
}


def parity_mix(checkpoint: Checkpoint, config: ModelConfig, responses: Path) -> list[Tokens]:
    """Finished rollouts, in the order of their files."""
    chat = ChatFormat(checkpoint, config)
    found = [locate(chat, list(response.conversation)) for response in read_responses(responses)]
    return [
        Tokens(ids=(*entry.prompt, *entry.response), response=len(entry.prompt)) for entry in found if entry.response
    ]


def lognormal_mix(rows: int, draw: random.Random) -> list[Tokens]:
    """Random tokens: lengths lognormal around 250, 80 to 2,048."""
    lengths = [min(2048, max(PROMPT_TOKENS + 20, round(draw.lognormvariate(5.52, 0.6)))) for _ in range(rows)]
    return [Tokens(ids=tuple(draw.choices(range(1000), k=length)), response=PROMPT_TOKENS) for length in lengths]


def measure_speed(
    rollouts: Sequence[Tokens], methods: dict[str, Callable[[MicroBatch], object]], pairs: int, draw: random.Random
) -> dict[str, Any]:
    """Seconds (wall, and CPU) of every method over the whole mix, pair by pair, and the ratios that follow."""
    sorted_batches, batches_of_16 = make_batches(rollouts, BUDGET), given_order(rollouts)
    wall: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run(sorted_batches[-1])
    for _ in range(pairs):
        for name in draw.sample(list(methods), len(methods)):
            start, start_cpu = time.perf_counter(), time.process_time()
            for batch in sorted_batches if name in ("ours", "compiled", "bare") else batches_of_16:
                methods[name](batch)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    tokens = sum(batch.tokens for batch in sorted_batches)
    return {
        "rollouts": len(rollouts),
        "tokens": tokens,
        "micro_batches": len(sorted_batches),
        "padding_waste": padding_waste(sorted_batches),
        "padding_waste_given_order": padding_waste(batches_of_16),
        "tokens_per_s": tokens / statistics.median(wall["ours"]),
        "seconds": wall,
        "cpu_seconds": cpu,
        "ours_over_bare": ratio(wall["ours"], wall["bare"]),
        "ours_over_bare_cpu": ratio(cpu["ours"], cpu["bare"]),
        "reference_over_ours": ratio(wall["reference"], wall["ours"]),
        "hidden_states_over_ours": ratio(wall["hidden_states"], wall["ours"]),
        "compiled_over_bare": ratio(wall["compiled"], wall["bare"]),
        "reference_over_compiled": ratio(wall["reference"], wall["compiled"]),
        "hidden_states_over_compiled": ratio(wall["hidden_states"], wall["compiled"]),
        "reference_over_bare": ratio(wall["reference"], wall["bare"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_FOLDER), help="checkpoint folder or Hugging Face id")
    parser.add_argument("--responses", type=Path, default=RESPONSES, help="folder of ROLE.jsonl for the parity mix")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-run"), help="scratch for the runs that write")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="2 pairs on few rollouts, one small shape")
    parser.add_argument("--only", choices=("speed", "cluster", "memory"), help="one part of it")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    pairs = 2 if arguments.quick else arguments.pairs
    draw = random.Random(0)
    config = ModelConfig(id=arguments.model, dtype="bfloat16")
    checkpoint = resolve(config)
    figures: dict[str, Any] = {"machine": describe_machine(Path.cwd()), "threads": torch.get_num_threads()}
    parity = parity_mix(checkpoint, config, arguments.responses)
    mixes = {
        "parity": parity[:6] if arguments.quick else parity,
        "lognormal": lognormal_mix(6 if arguments.quick else 32, draw),
    }
    # Waste is a matter of windows, so the mix is judged by whole ones.
    window = make_batches(lognormal_mix(ExtractConfig().window_rows, draw), ExtractConfig().micro_batch_tokens)
    figures["padding_waste"] = padding_waste(window)
    print(f"padding in a window of {ExtractConfig().window_rows} lognormal rollouts: {figures['padding_waste']:.1%}")

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")

    if arguments.only in (None, "speed"):
        methods = {name: method(checkpoint, config.settled_dtype) for name, method in METHODS.items()}
        for name, mix in mixes.items():
            figures[name] = measure_speed(mix, methods, pairs, draw)
            for key, found in figures[name].items():
                if "_over_" in key:
                    show(f"{name}: {key}", found)
            print(f"{name}: {figures[name]['tokens_per_s']:,.0f} tokens/s, waste {figures[name]['padding_waste']:.1%}")
        figures |= {key: found["median"] for key, found in figures["parity"].items() if "_over_" in key}
        del methods
        save()
    if arguments.only in (None, "cluster"):
        found = measure_cluster(arguments.model, arguments.responses, arguments.folder, pairs)
        figures["cluster"] = {**found, "ratio": ratio(found["ray"], found["engine"])}
        figures["ray_over_engine"] = figures["cluster"]["ratio"]["median"]
        show(
            f"two Ray stages that write, over one engine ({found['micro_batches'][0]} batches)",
            figures["cluster"]["ratio"],
        )
        save()
    if arguments.only in (None, "memory"):
        shapes = [(4, 128)] if arguments.quick else [(16, 512), (16, 2048)]
        figures["memory"] = measure_memory(checkpoint, shapes)
        for shape, found in figures["memory"].items():
            print(f"{shape}: " + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in found.items()))
        largest = list(figures["memory"].values())[-1]
        figures |= {"extra_peak_bytes": largest["ours"], "extra_peak_bound_bytes": largest["bound"]}
        save()


if __name__ == "__main__":
    main()
