"""Generation with vLLM: continuous batching, shared prefixes, tensor parallel on one node. Token ids in and out.

vLLM's scheduler runs in this process, so that a run depends on nothing but its requests; with several ranks the model
lies in processes below this one, which end with it.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Dtype, GenerateConfig, VllmConfig
from personaspace.extract.generate.ending import checkpoint_stop_ids, end_response
from personaspace.extract.generate.engine import Response
from personaspace.store.errors import InputError

CPU_CACHE_GIB = 2.0
CPU_BLOCK = 32
"""Tokens; its kernels take multiples of this."""
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # The order in which requests are seen is then ours.
    "VLLM_NO_USAGE_STATS": "1",  # It would tell its makers of every start.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Several replicas of a node would all take the same cores.
}


def check_vllm() -> None:
    """Raise InputError where vLLM is not installed in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"generate.engine: vllm, which is not installed for {sys.executable}. Build its environment (`make vllm`, "
            "see docs/generation.md) on every node and give its Python as cluster.vllm.python."
        )


class VllmEngine:
    """A model in vLLM that samples responses (generate.engine.Engine).

    ``device`` is `cpu` or `cuda`; ``ranks`` GPUs, or processes of ``threads`` threads each, hold the model together.
    Each request has a generator of its own, seeded with its seed, so batches and order change nothing but roundings
    (see docs/generation.md for what that comes to).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        chat: ChatFormat,
        config: VllmConfig,
        *,
        dtype: Dtype,
        device: str = "cpu",
        ranks: int = 1,
        threads: int = 1,
    ) -> None:
        check_vllm()
        os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
        on_cpu = device == "cpu"
        if on_cpu:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # Of the processes of the ranks.
        from vllm import LLM  # Reads the environment when imported.

        gib = config.cache_gib or (CPU_CACHE_GIB if on_cpu else None)
        self._chat = chat
        self._stops = checkpoint_stop_ids(checkpoint, chat)
        self._max_positions = checkpoint.max_positions
        self._llm: Any = LLM(
            model=checkpoint.source,
            revision=checkpoint.revision,
            tokenizer_revision=checkpoint.revision,
            trust_remote_code=checkpoint.trust_remote_code,
            dtype=dtype,
            tensor_parallel_size=ranks,
            distributed_executor_backend="uni" if ranks == 1 else "mp",
            # As long as the model allows, or as memory does.
            max_model_len=-1,
            max_num_seqs=config.max_sequences,
            gpu_memory_utilization=config.memory,
            kv_cache_memory_bytes=None if gib is None else int(gib * 2**30),
            enable_prefix_caching=True,
            enforce_eager=on_cpu if config.eager is None else config.eager,
            # Only our settings count: a checkpoint's own sampling defaults must not slip in.
            generation_config="vllm",
            seed=0,
            # On CPUs it shares prefixes by 128 tokens unless told otherwise: more than many a system prompt has.
            **({"block_size": CPU_BLOCK} if on_cpu else {}),
        )
        self.maker: str | None = f"vllm {importlib.metadata.version(_distribution())}"
        self.longest = int(self._llm.model_config.max_model_len)
        """Tokens of prompt and response together."""
        self.prompt_tokens = 0
        """Of all prompts until now."""
        self.shared_tokens = 0
        """Those of them that were in the cache, as the start of an earlier prompt."""

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Response]:
        """Sample one response per prompt (token ids), each with its own seed.

        Raises InputError where memory is too small for rollouts that the model's own context would hold.
        """
        from vllm import SamplingParams

        needed = max(len(prompt) for prompt in prompts) + config.max_new_tokens
        if self.longest < needed and (self._max_positions is None or self.longest < self._max_positions):
            raise InputError(
                f"cluster.vllm: memory holds rollouts of {self.longest} tokens, and {needed} may be needed. Raise "
                "cluster.vllm.cache_gib (or, on GPUs, .memory), or spread the model over more GPUs."
            )
        stops = self._chat.stop_strings
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) < self.longest]
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompts[place])} for place in fitting],
            [
                SamplingParams(
                    temperature=config.temperature,
                    top_p=config.top_p,
                    seed=seeds[place],
                    max_tokens=config.max_new_tokens,
                    stop_token_ids=self._stops,
                    ignore_eos=True,  # All that end a turn are in stop_token_ids.
                    stop=stops or None,
                    detokenize=bool(stops),
                )
                for place in fitting
            ],
            use_tqdm=False,
        )
        self.prompt_tokens += sum(len(prompts[place]) for place in fitting)
        self.shared_tokens += sum(output.num_cached_tokens or 0 for output in outputs)
        sampled = {place: list(output.outputs[0].token_ids) for place, output in zip(fitting, outputs, strict=True)}
        return [
            end_response(self._chat, self._stops, sampled[place])
            if place in sampled
            else _too_long(len(prompt), self.longest)
            for place, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """End the processes of its ranks, and free its memory. It can't generate after it."""
        self._llm.llm_engine.engine_core.shutdown()


def _distribution() -> str:
    """Name under which vLLM is installed: builds for CPUs have one of their own."""
    return importlib.metadata.packages_distributions()["vllm"][0]


def _too_long(tokens: int, longest: int) -> Response:
    reason = f"the prompt's {tokens} tokens leave no room in the model's context of {longest}"
    return Response(token_ids=[], text="", finish_reason="length", unusable=reason)
