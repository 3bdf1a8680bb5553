"""Generation with transformers: one whole model in this process, static batches, token ids in and out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from personaspace.extract.anatomy import dissect
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Dtype, GenerateConfig
from personaspace.extract.generate.capture import Capture
from personaspace.extract.generate.continuous import sample_continuously
from personaspace.extract.generate.ending import end_response, stop_ids
from personaspace.extract.generate.engine import Captured, Response
from personaspace.extract.generate.noise import GumbelTopP
from personaspace.extract.hooks import LayerHook, changed
from personaspace.extract.packing import MicroBatch
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import Readout
from personaspace.extract.slicing import Slice
from personaspace.extract.stage import Stage
from personaspace.store.rollouts import Span


def load_causal_lm(checkpoint: Checkpoint, *, dtype: Dtype, device: str = "cpu") -> PreTrainedModel:
    """The whole model with its head, on one device."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint.source, dtype=getattr(torch, dtype), device_map=device, **checkpoint.loading()
    )
    return model.eval()


class TransformersEngine:
    """A causal language model that samples responses for batches of prompts (generate.engine.Engine).

    In float32 a response depends on its prompt, seed and settings alone; in bfloat16 on the batch, too. ``device``
    takes the prompts; weights may lie elsewhere. Where a gang of processes runs the model in lock-step, ``agree`` makes
    the token ids (B,) that this process has sampled the same in all of them.
    """

    maker: str | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        *,
        device: str = "cpu",
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._chat = chat
        self._device = torch.device(device)
        self._model: Any = model
        self._agree = agree
        self._capture: Capture | None = None
        self._hooks: tuple[LayerHook, ...] = ()
        self._changed: Callable[[], AbstractContextManager[None]] = nullcontext
        self._stop_ids = stop_ids(self._model.generation_config.eos_token_id, chat.tokenizer.eos_token_id)
        # Only these settings count: a checkpoint's own sampling defaults must not slip in.
        self._model.generation_config = GenerationConfig(
            eos_token_id=self._stop_ids or None, pad_token_id=next(iter(self._stop_ids), 0), do_sample=False
        )

    def slice(self, checkpoint: Checkpoint) -> Slice:
        """Its decoder, all blocks, as extraction sees it."""
        parts = dissect(self._model, checkpoint.layers)
        return Slice(
            first=0,
            stop=checkpoint.layers,
            hidden=checkpoint.hidden,
            dtype=self._model.dtype,
            device=self._device,
            decoder=parts.decoder,
            blocks=parts.blocks,
            compiled=False,
        )

    def intervene(self, checkpoint: Checkpoint, hooks: Sequence[LayerHook]) -> None:
        """From now on, change the residual stream so (generate.engine.InnerEngine)."""
        parts = dissect(self._model, checkpoint.layers)
        self._hooks = tuple(hooks)
        self._changed = partial(changed, parts.decoder, parts.blocks, self._hooks)

    def capture(self, checkpoint: Checkpoint, readout: Readout, layers: Sequence[int]) -> None:
        """From now on, read ``layers`` while generating (generate.engine.InnerEngine)."""
        stops = self._chat.stop_strings
        # No token holds less than a byte of a stop string.
        remembered = max((len(stop.encode()) for stop in stops), default=0)
        self._slice, self._readout, self._layers = self.slice(checkpoint), readout, tuple(layers)
        self._capture = Capture(self._slice, readout, layers, stop_ids=self._stop_ids, remembered=remembered)

    def replay(self, sampled: Mapping[int, tuple[Sequence[int], Response]]) -> dict[int, Pooled]:
        """Row -> its sums in a forward pass over the finished rollout, given its prompt and response."""
        if not sampled:
            return {}
        batch = MicroBatch(
            rows=tuple(sampled),
            token_ids=tuple((*prompt, *response.token_ids) for prompt, response in sampled.values()),
            segments=tuple(self._readout.segments([_whole(*both)]) for both in sampled.values()),
            begins=tuple(len(prompt) for prompt, _ in sampled.values()),
        )
        with Stage(self._slice, sites=self._readout.sites, layers=self._layers, hooks=self._hooks) as stage:
            return stage.forward(batch).pooled()

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Response]:
        """Sample one response per prompt (token ids), each with its own seed."""
        return [response for response, _ in self.generate_captured(prompts, seeds, config)]

    @torch.inference_mode()
    def generate_captured(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig
    ) -> list[Captured]:
        """The same, with what `capture` asked for; None where it was not called."""
        if config.batching == "continuous":
            with self._changed():
                sampled = sample_continuously(self._model, prompts, seeds, config, self._model.generation_config)
            return [(end_response(self._chat, self._stop_ids, token_ids), None) for token_ids in sampled]
        length = max(len(prompt) for prompt in prompts)
        ids_BT = torch.zeros((len(prompts), length), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, length - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, length - len(prompt) :] = 1
        sampler = GumbelTopP(list(seeds), temperature=config.temperature, top_p=config.top_p, prompt_length=length)
        processors: list[LogitsProcessor] = [sampler] if self._agree is None else [sampler, _Agreed(self._agree)]
        if self._capture is not None:
            self._capture.begin(len(prompts), length)
            processors.append(_Stepping(self._capture))
        stops = self._chat.stop_strings
        with self._changed():
            generated_BT = self._model.generate(
                input_ids=ids_BT.to(self._device),
                attention_mask=mask_BT.to(self._device),
                # Captured, the last token has to pass, too: what is sampled after it is thrown away.
                max_new_tokens=config.max_new_tokens + (self._capture is not None),
                logits_processor=LogitsProcessorList(processors),
                **({"stop_strings": stops, "tokenizer": self._chat.tokenizer} if stops else {}),
            )
        sampled = generated_BT[:, length : length + config.max_new_tokens].tolist()
        responses = [end_response(self._chat, self._stop_ids, token_ids) for token_ids in sampled]
        if self._capture is None:
            return [(response, None) for response in responses]
        pooled = self._capture.finish([len(response.token_ids) for response in responses])
        return list(zip(responses, pooled, strict=True))


def _whole(prompt: Sequence[int], response: Response) -> Span:
    return Span(turn=0, part="whole", start=len(prompt), stop=len(prompt) + len(response.token_ids))


class _Stepping(LogitsProcessor):
    """Tells the capture of every forward pass."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``scores``, as they are."""
        self._capture.step(input_ids)
        return scores


class _Agreed(LogitsProcessor):
    """Leaves each row only the token that all processes have agreed on."""

    def __init__(self, agree: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._agree = agree

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, V)`` with the agreed token's at 0 and all others at minus infinity."""
        token_B = self._agree(scores.argmax(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B[:, None], 0.0)
