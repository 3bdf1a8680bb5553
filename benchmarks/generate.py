"""Generation: engines against a naive loop, and capturing while generating against a second pass, side by side.

    python benchmarks/generate.py                           # SmolLM2-135M (make demo fetches it); half an hour
    python benchmarks/generate.py --vllm .venv-vllm/bin/python   # beside vLLM (`make vllm`)
    python benchmarks/generate.py --quick --json out.json
    python benchmarks/generate.py --device cuda --random --rows 1024 --batch 256   # Llama 3.1 8B's shape

- static, continuous: batches of the transformers engine; vllm: the vllm engine, in a process of its environment;
  naive: stock `generate`, one prompt after another. All sample with the same temperature and top-p.
  `engine_over_naive` is the ratio of response tokens per second.
- `capture_over_generate`: time of static batches that are captured, over the same without.
- `replay_total_over_capture_total`: time of generating and a pass over the finished rollouts, over that of capturing.
- `min_cosine`: the least cosine, over rollouts and layers, of captured means and those of a replay.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract_gpu import LLAMA_8B, TINY
from generate_vllm import MEANS, Sampled, VllmProcess
from machine import describe_machine
from ratios import ratio, show
from transformers import AutoModelForCausalLM, LlamaConfig

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.demo_model import DEFAULT_FOLDER
from personaspace.extract.generate.engine import Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.packing import MicroBatch, form_batches
from personaspace.extract.personas import plan_personas
from personaspace.extract.pooling import Pooled
from personaspace.extract.slicing import Slice
from personaspace.extract.stage import Stage
from personaspace.store.rollouts import Span

TOKEN_BUDGET = 4096
"""Tokens of a micro-batch of the replay."""


class Bench:
    """A model, and what is measured on it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        chat: ChatFormat,
        rows: int,
        config: GenerateConfig,
        device: str,
        vllm: VllmProcess | None,
    ) -> None:
        self.config, self._chat, self._model, self._vllm = config, chat, model, vllm
        self._engine = TransformersEngine(self._model, self._chat, device=device)
        self._captured = TransformersEngine(self._model, self._chat, device=device)
        self._slice: Slice = self._engine.slice(checkpoint)
        self._captured.capture(checkpoint, MEANS, range(checkpoint.layers))
        plan = plan_personas(PersonasConfig(prompts=1), model_name=checkpoint.name, generation="benchmark")
        chosen = plan.rows[:: len(plan.rows) // rows][:rows]
        self._prompts = [self._chat.encode_prompt(row.messages) for row in chosen]
        self._seeds = [rollout_seed(0, row.rollout_id) for row in chosen]
        self._device = device

    def static(self) -> list[Response]:
        return self._in_batches(self._engine.generate, self.config)

    def continuous(self) -> list[Response]:
        return self._engine.generate(self._prompts, self._seeds, replace(self.config, batching="continuous"))

    def vllm(self) -> Sampled:
        assert self._vllm
        return self._vllm.sample(self._prompts, self._seeds, self.config)

    def vllm_capture(self) -> Sampled:
        assert self._vllm
        return self._vllm.sample(self._prompts, self._seeds, self.config, capture=True)

    def capture(self) -> list[tuple[Response, Pooled | None]]:
        return self._in_batches(self._captured.generate_captured, self.config)

    def naive(self) -> list[Response]:
        """What a script does: one prompt at a time, with transformers' own sampling. Of every eighth: it is slow."""
        responses = []
        for prompt, seed in zip(self._prompts[::8], self._seeds[::8], strict=True):
            torch.manual_seed(seed)
            ids_BT = torch.tensor([prompt], device=self._device)
            with torch.inference_mode():
                made_BT = self._model.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    do_sample=True,
                    temperature=self.config.temperature,
                    top_p=self.config.top_p,
                    top_k=0,
                    max_new_tokens=self.config.max_new_tokens,
                )
            token_ids = made_BT[0, len(prompt) :].tolist()
            responses.append(Response(token_ids=token_ids, text="", finish_reason="length"))
        return responses

    def replay(self, responses: Sequence[Response]) -> dict[int, Pooled]:
        """A forward pass over the finished rollouts, in padded micro-batches, as extraction makes it."""
        tokens, segments = {}, {}
        for row, (prompt, response) in enumerate(zip(self._prompts, responses, strict=True)):
            if response.token_ids:
                tokens[row] = (*prompt, *response.token_ids)
                whole = Span(turn=0, part="whole", start=len(prompt), stop=len(tokens[row]))
                segments[row] = MEANS.segments([whole])
        batches: list[MicroBatch] = form_batches(tokens, segments, TOKEN_BUDGET, packed=False)
        pooled: dict[int, Pooled] = {}
        with Stage(self._slice) as stage:
            for batch in batches:
                pooled |= stage.forward(batch).pooled()
        return pooled

    def _in_batches(self, generate: Callable[..., list[Any]], config: GenerateConfig) -> list[Any]:
        size = config.batch_rows
        return [
            made
            for start in range(0, len(self._prompts), size)
            for made in generate(self._prompts[start : start + size], self._seeds[start : start + size], config)
        ]


def measure(bench: Bench, rounds: int, *, vllm: bool) -> dict[str, Any]:
    """Seconds and tokens of each contender in each round, in an order that alternates."""
    contenders: dict[str, Callable[[], Any]] = {
        "static": bench.static,
        "capture": bench.capture,
        "continuous": bench.continuous,
        "naive": bench.naive,
    }
    bench.capture()  # Nobody pays for what happens once.
    if vllm:
        contenders |= {"vllm": bench.vllm, "vllm capture": bench.vllm_capture}
        bench.vllm()
    found: dict[str, Any] = {name: {"seconds": [], "tokens": []} for name in (*contenders, "replay")}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        names = list(contenders)[:: -1 if number % 2 else 1]
        for name in names:
            begin = time.perf_counter()
            made = contenders[name]()
            found[name]["seconds"].append(time.perf_counter() - begin)
            if isinstance(made, Sampled):
                found[name]["tokens"].append(made.tokens)
                continue
            responses = [one[0] for one in made] if name == "capture" else made
            found[name]["tokens"].append(sum(len(response.token_ids) for response in responses))
            if name == "static":
                begin = time.perf_counter()
                bench.replay(responses)
                found["replay"]["seconds"].append(time.perf_counter() - begin)
                found["replay"]["tokens"].append(found["static"]["tokens"][-1])
    return found


def random_model(checkpoint: Checkpoint, dtype: Dtype, device: str, *, quick: bool) -> tuple[Checkpoint, Any]:
    """A Llama of random weights, made on the device, and the checkpoint as if it were that."""
    shape = {**(TINY if quick else LLAMA_8B), "vocab_size": LLAMA_8B["vocab_size"]}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=getattr(torch, dtype))
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    return replace(checkpoint, layers=layers, hidden=hidden), model.eval()


def agreement(bench: Bench) -> float:
    """Least cosine of captured means and those of a replay, over rollouts and layers."""
    made = bench.capture()
    truths = bench.replay([response for response, _ in made])
    least = 1.0
    for row, truth in truths.items():
        pooled = made[row][1]
        assert pooled is not None
        ours, theirs = pooled.means_SD.astype(np.float64), truth.means_SD.astype(np.float64)
        cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
        least = min(least, float(cosines.min()))
    return least


def per_second(found: dict[str, Any], name: str) -> list[float]:
    return [tokens / seconds for tokens, seconds in zip(found[name]["tokens"], found[name]["seconds"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_FOLDER), help="checkpoint folder")
    parser.add_argument("--random", action="store_true", help="random weights of Llama 3.1 8B's shape, not the model's")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with vLLM; with --model only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=96, help="longest response")
    parser.add_argument("--batch", type=int, default=48, help="rollouts of a static batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="8 rollouts of 16 tokens, 2 rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.vllm and arguments.random:
        parser.error("--vllm loads the weights of --model, so it does not go with --random")
    rows, tokens, batch, rounds = arguments.rows, arguments.tokens, arguments.batch, arguments.rounds
    if arguments.quick:
        rows, tokens, batch, rounds = 8, 16, 4, 2
    config = GenerateConfig(max_new_tokens=tokens, batch_rows=batch)
    figures: dict[str, Any] = {"machine": describe_machine(Path.cwd())}

    def bench(dtype: Dtype, vllm: VllmProcess | None = None) -> Bench:
        named = ModelConfig(id=arguments.model, dtype=dtype)
        checkpoint = resolve(named, hashed=False)
        chat = ChatFormat(checkpoint, named)
        if arguments.random:
            checkpoint, model = random_model(checkpoint, dtype, arguments.device, quick=arguments.quick)
        else:
            model = load_causal_lm(checkpoint, dtype=dtype, device=arguments.device)
        return Bench(checkpoint, model, chat, rows, config, arguments.device, vllm)

    figures["min_cosine"] = {dtype: agreement(bench(dtype)) for dtype in ("float32", "bfloat16")}
    print(f"least cosine of captured and replayed means: {figures['min_cosine']}")
    vllm = None
    if arguments.vllm:
        served = ModelConfig(id=arguments.model, dtype="bfloat16")
        vllm = VllmProcess(arguments.vllm, served, threads=torch.get_num_threads())
        print(f"vllm: loaded in {vllm.loading:.0f} s")
    found = measure(bench("bfloat16", vllm), rounds, vllm=vllm is not None)
    if vllm:
        vllm.close()
    speeds = {name: per_second(found, name) for name in found if name != "replay"}
    for name, each in speeds.items():
        print(f"{name}: median {statistics.median(each):,.0f} response tokens/s")
    engines = {
        name: ratio(speeds[name], speeds["naive"]) for name in speeds if "capture" not in name and name != "naive"
    }
    captured = ratio(found["capture"]["seconds"], found["static"]["seconds"])
    both = [a + b for a, b in zip(found["static"]["seconds"], found["replay"]["seconds"], strict=True)]
    captured_by_vllm = ratio(found["vllm capture"]["seconds"], found["vllm"]["seconds"]) if vllm else None
    total = ratio(both, found["capture"]["seconds"])
    for name, each_ratio in engines.items():
        show(f"{name} over naive", each_ratio)
    show("time of capturing over generating alone", captured)
    show("time of generating and replaying over capturing", total)
    if captured_by_vllm:
        show("time of vllm capturing over vllm generating alone", captured_by_vllm)
        figures["vllm_capture_over_vllm"] = captured_by_vllm["median"]
    figures |= {
        "measured": found,
        "engine_over_naive": {name: each_ratio["median"] for name, each_ratio in engines.items()},
        "capture_over_generate": captured["median"],
        "replay_total_over_capture_total": total["median"],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
