"""Generation with vLLM: continuous batching, shared prefixes, tensor parallel on one node. Token ids in and out.

vLLM's scheduler runs in this process, so that a run depends on nothing but its requests; with several ranks the model
lies in processes below this one, which end with it.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Dtype, GenerateConfig, VllmConfig
from personaspace.extract.generate.capture import SegmentTokens
from personaspace.extract.generate.ending import checkpoint_stop_ids, end_response
from personaspace.extract.generate.engine import Captured, Response
from personaspace.extract.generate.vllm_step import requested
from personaspace.extract.generate.vllm_worker import COMPARED, InnerWorker
from personaspace.extract.hooks import LayerHook
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import Readout, token_range
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
    Only one that is ``opened`` can `capture` and `intervene`.
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
        opened: bool = False,
    ) -> None:
        check_vllm()
        os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
        on_cpu = device == "cpu"
        if on_cpu:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # Of the processes of the ranks.
        if opened:
            # How its newer runner lays out a step is not known here.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        from vllm import LLM  # Reads the environment when imported.

        gib = config.cache_gib or (CPU_CACHE_GIB if on_cpu else None)
        self._chat = chat
        self._readout: Readout | None = None
        self._salt: Callable[[], str] | None = None
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
            enforce_eager=on_cpu or opened if config.eager is None else config.eager,
            worker_extension_cls=f"{InnerWorker.__module__}.{InnerWorker.__qualname__}" if opened else "",
            # Only our settings count: a checkpoint's own sampling defaults must not slip in.
            generation_config="vllm",
            seed=0,
            # On CPUs it shares prefixes by 128 tokens unless told otherwise: more than many a system prompt has. And a
            # prompt that is read in parts ends the process there, since vLLM rewinds the generator of its seed.
            **({"block_size": CPU_BLOCK, "enable_chunked_prefill": False} if on_cpu else {}),
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
        return self._sample(prompts, seeds, config, [len(prompt) for prompt in prompts], config.max_new_tokens)

    def intervene(self, checkpoint: Checkpoint, hooks: Sequence[LayerHook]) -> None:
        """From now on, change the residual stream so; once, and before `capture` (generate.engine.InnerEngine)."""
        _check_compared(checkpoint, "steer")
        # What is cached was read unchanged. And where only responses change, they do not where a later prompt quotes
        # them: prompts of other batches are no prefix then.
        batches = itertools.count()
        of_batch = any(hook.positions == "response" for hook in hooks)
        self._salt = (lambda: f"steered {next(batches)}") if of_batch else (lambda: "steered")
        self._llm.collective_rpc("intervene", args=(list(hooks), checkpoint.layers))

    def capture(self, checkpoint: Checkpoint, readout: Readout, layers: Sequence[int]) -> None:
        """From now on, `generate_captured` reads ``layers`` (generate.engine.InnerEngine)."""
        _check_compared(checkpoint, "generate.capture")
        self._readout = readout
        segments = [token_range(name) for name in readout.reductions]
        self._llm.collective_rpc("start_capture", args=(list(layers), checkpoint.layers, segments))

    def generate_captured(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Captured]:
        """The same, with what `capture` asked for.

        None for responses that a stop string ended, that vLLM put off and began anew, or that fill the context.
        """
        begins = [len(prompt) for prompt in prompts]
        with self._capturing(config.max_new_tokens) as sums:
            # The last token has to pass, too: what is sampled after it is thrown away.
            responses = self._sample(prompts, seeds, config, begins, config.max_new_tokens + 1)
        lengths = [len(response.token_ids) for response in responses]
        return list(zip(responses, self._pooled(sums, lengths), strict=True))

    def replay(self, sampled: Mapping[int, tuple[Sequence[int], Response]]) -> dict[int, Pooled]:
        """Row -> its sums in a forward pass over the finished rollout, given its prompt and response."""
        wholes = [[*prompt, *response.token_ids] for prompt, response in sampled.values()]
        begins = [len(prompt) for prompt, _ in sampled.values()]
        lengths = [len(response.token_ids) for _, response in sampled.values()]
        with self._capturing(max(lengths, default=0)) as sums:
            self._sample(wholes, [0] * len(wholes), GenerateConfig(max_new_tokens=1), begins, 1, anew=True)
        found = zip(sampled, self._pooled(sums, lengths), strict=True)
        return {row: pooled for row, pooled in found if pooled is not None}

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        config: GenerateConfig,
        begins: Sequence[int],
        sampled_tokens: int,
        *,
        anew: bool = False,
    ) -> list[Response]:
        """``begins``: tokens before each response. ``anew``: nothing is taken from the cache of prefixes."""
        from vllm import SamplingParams

        needed = max((len(prompt) for prompt in prompts), default=0) + config.max_new_tokens
        if self.longest < needed and (self._max_positions is None or self.longest < self._max_positions):
            raise InputError(
                f"cluster.vllm: memory holds rollouts of {self.longest} tokens, and {needed} may be needed. Raise "
                "cluster.vllm.cache_gib (or, on GPUs, .memory), or spread the model over more GPUs."
            )
        stops = self._chat.stop_strings
        fitting = [place for place, prompt in enumerate(prompts) if len(prompt) < self.longest]
        salt = {} if self._salt is None else {"cache_salt": self._salt()}
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompts[place]), **salt} for place in fitting],
            [
                SamplingParams(
                    temperature=config.temperature,
                    top_p=config.top_p,
                    seed=seeds[place],
                    max_tokens=sampled_tokens,
                    stop_token_ids=self._stops,
                    ignore_eos=True,  # All that end a turn are in stop_token_ids.
                    stop=stops or None,
                    detokenize=bool(stops),
                    skip_reading_prefix_cache=anew,
                    extra_args=requested(place, begins[place]),
                )
                for place in fitting
            ],
            use_tqdm=False,
        )
        self.prompt_tokens += sum(len(prompts[place]) for place in fitting)
        self.shared_tokens += sum(output.num_cached_tokens or 0 for output in outputs)
        sampled = {
            place: list(output.outputs[0].token_ids)[: config.max_new_tokens]
            for place, output in zip(fitting, outputs, strict=True)
        }
        return [
            end_response(self._chat, self._stops, sampled[place])
            if place in sampled
            else _too_long(len(prompt), self.longest)
            for place, prompt in enumerate(prompts)
        ]

    @contextmanager
    def _capturing(self, longest: int) -> Iterator[dict[int, tuple[NDArray[np.float32], int]]]:
        """Sums of the responses that are sampled within, by their place, at its end."""
        sums: dict[int, tuple[NDArray[np.float32], int]] = {}
        self._llm.collective_rpc("begin_capture", args=(longest, self._stops))
        try:
            yield sums
        finally:
            for found in self._llm.collective_rpc("end_capture"):
                sums |= found

    def _pooled(
        self, sums: Mapping[int, tuple[NDArray[np.float32], int]], lengths: Sequence[int]
    ) -> Iterator[Pooled | None]:
        """Of each response, given its length; None if not just its own tokens were summed."""
        assert self._readout is not None
        tokens = [SegmentTokens(*token_range(name)) for name in self._readout.reductions]
        for place, length in enumerate(lengths):
            sums_SLD, seen = sums.get(place, (None, 0))
            if sums_SLD is None or seen != length:
                yield None
                continue
            counts_S = np.array([segment.count(length) for segment in tokens])
            yield Pooled(sums_SD=sums_SLD.transpose(1, 0, 2)[None], counts_S=counts_S)

    def close(self) -> None:
        """End the processes of its ranks, and free its memory. It can't generate after it."""
        self._llm.llm_engine.engine_core.shutdown()


def _check_compared(checkpoint: Checkpoint, key: str) -> None:
    [architecture] = checkpoint.config().architectures or ["unknown"]
    if architecture not in COMPARED:
        raise InputError(
            f"{key}: vLLM's {architecture} was not compared with transformers', so nobody knows that it is read "
            f"rightly. Known: {', '.join(sorted(COMPARED))}. Leave {key} out, or use generate.engine transformers."
        )


def _distribution() -> str:
    """Name under which vLLM is installed: builds for CPUs have one of their own."""
    return importlib.metadata.packages_distributions()["vllm"][0]


def _too_long(tokens: int, longest: int) -> Response:
    reason = f"the prompt's {tokens} tokens leave no room in the model's context of {longest}"
    return Response(token_ids=[], text="", finish_reason="length", unusable=reason)
