"""vLLM to compare generation with, in an environment of its own.

    vllm = VllmProcess(Path(".venv-vllm/bin/python"), model, threads=2)   # loads the model once
    vllm.sample(prompts, seeds, GenerateConfig(max_new_tokens=64)).rate   # tokens/s

Run as a program (in vLLM's environment) this is what `VllmProcess` talks to.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from personaspace.extract.config import GenerateConfig, ModelConfig, VllmConfig
from personaspace.extract.reductions import Readout, plan_arrays

MEANS = Readout.of_arrays(plan_arrays(("resid_post",), ("mean",), None))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a batch took."""

    seconds: float
    tokens: int
    """Of responses, without what ended them."""
    shared: float = 0.0
    """Share of the prompts' tokens that came from the cache of prefixes, since the start."""

    @property
    def rate(self) -> float:
        """Response tokens per second."""
        return self.tokens / self.seconds


class VllmProcess:
    """The vllm engine in a process of ``python``, with its model loaded. Close it at the end."""

    def __init__(
        self, python: Path, model: ModelConfig, *, threads: int, ranks: int = 1, config: VllmConfig | None = None
    ) -> None:
        asked = {"model": asdict(model), "threads": threads, "ranks": ranks, "vllm": asdict(config or VllmConfig())}
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [str(python), __file__, json.dumps(asked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._receive()
        self.loading = time.perf_counter() - begin
        """Seconds from its start until the model was there."""

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig, *, capture: bool = False
    ) -> Sampled:
        """Sample one response per prompt (token ids); ``seconds`` are of the process, without the way there.

        ``capture``: with the means of all layers.
        """
        work = {
            "prompts": [list(prompt) for prompt in prompts],
            "seeds": list(seeds),
            "config": asdict(config),
            "capture": capture,
        }
        assert self._process.stdin
        print(json.dumps(work), file=self._process.stdin, flush=True)
        return Sampled(**self._receive())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of vLLM ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve() -> None:
    """In vLLM's environment: load the model, then a batch per line of stdin."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from personaspace.extract.chat import ChatFormat
    from personaspace.extract.checkpoint import resolve
    from personaspace.extract.generate.vllm_engine import VllmEngine

    asked = json.loads(sys.argv[1])
    model = ModelConfig(**asked["model"])
    checkpoint = resolve(model)
    engine = VllmEngine(
        checkpoint,
        ChatFormat(checkpoint, model),
        VllmConfig(**asked["vllm"]),
        dtype=model.settled_dtype,
        ranks=asked["ranks"],
        threads=asked["threads"],
        opened=True,
    )
    engine.capture(checkpoint, MEANS, range(checkpoint.layers))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        del work["config"]["endpoint"]
        begin = time.perf_counter()
        config = GenerateConfig(**work["config"])
        if work["capture"]:
            captured = engine.generate_captured(work["prompts"], work["seeds"], config)
            assert all(pooled is not None for _, pooled in captured)
            responses = [response for response, _ in captured]
        else:
            responses = engine.generate(work["prompts"], work["seeds"], config)
        seconds = time.perf_counter() - begin
        tokens = sum(len(response.token_ids) for response in responses)
        shared = engine.shared_tokens / engine.prompt_tokens
        print(json.dumps({"seconds": seconds, "tokens": tokens, "shared": shared}), file=answers, flush=True)
    engine.close()


if __name__ == "__main__":
    serve()
