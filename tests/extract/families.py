"""Every family's truth: one plain forward pass per rollout, read by hooks that a person chose for that family.

The truth does not find its way by extract/anatomy.py or extract/sites.py. Shape suffixes: Z sites, L layers, S segments
of a rollout, T tokens, D hidden.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import Dtype, ModelConfig, Site
from personaspace.extract.hooks import LayerHook
from personaspace.extract.packing import MicroBatch, Segment
from personaspace.extract.reductions import Readout, plan_arrays
from personaspace.extract.slicing import Slice, load_slice
from personaspace.extract.stage import Stage
from personaspace.store.rollouts import Span
from tests.models import SLIDING_WINDOW, tiny_checkpoint

LAYERS = 6
CUTS = ((0, 6), (0, 2, 6), (0, 1, 5, 6))
SITES: tuple[Site, ...] = ("resid_post", "resid_pre", "attn_out", "mlp_out")
REDUCTIONS = ("mean", "last_prompt", "first_4", "turns", "parts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a person who has read a family's source would hook."""

    blocks: str = "layers"
    attention: str = "self_attn"
    """Submodule of a block whose output, times ``scale``, is what attention adds."""
    mlp: str = "mlp"
    scale: float = 1.0
    sites: tuple[Site, ...] = SITES
    """Those that can be read."""
    unpackable: str = ""
    """Why rollouts that are packed into one sequence see each other; empty if they don't."""
    note: str = ""


_RESIDUAL: tuple[Site, ...] = ("resid_post", "resid_pre")
_POST_NORMS = Reading(attention="post_attention_layernorm", mlp="post_feedforward_layernorm")
READINGS = {
    "llama": Reading(),
    "qwen2": Reading(note="biases in attention"),
    "qwen3": Reading(note="norms of queries and keys"),
    "qwen3_moe": Reading(note="4 experts, 2 active"),
    "gemma2": replace(_POST_NORMS, note=f"scaled embedding, post-norms, window of {SLIDING_WINDOW} in 1 of 2 layers"),
    "gemma3_text": replace(_POST_NORMS, note=f"as gemma2; window of {SLIDING_WINDOW} in 5 of 6 layers"),
    "gemma3": replace(_POST_NORMS, blocks="language_model.layers", note="takes images; its text side is read"),
    "mistral": Reading(note=f"window of {SLIDING_WINDOW}"),
    "mixtral": Reading(note="4 experts, 2 active"),
    "phi3": Reading(attention="resid_attn_dropout", mlp="resid_mlp_dropout", note="fused projections"),
    "olmo2": replace(_POST_NORMS, note="post-norms only"),
    "gpt_neox": Reading(
        attention="post_attention_dropout", mlp="post_mlp_dropout", note="attention and MLP side by side"
    ),
    "gpt2": Reading(blocks="h", attention="attn", note="learned positions"),
    "gpt_oss": Reading(
        unpackable="transformers makes its masks without positions",
        note=f"attention sinks, 4 experts, window of {SLIDING_WINDOW} in 1 of 2 layers",
    ),
    "deepseek_v3": Reading(note="latent attention, 4 experts behind 2 dense layers"),
    "granite": Reading(scale=0.4, note="scaled embedding, sublayers times 0.4"),
    "cohere2": Reading(note=f"attention and MLP side by side, window of {SLIDING_WINDOW} in 3 of 4 layers"),
    "gptj": Reading(blocks="h", attention="attn", note="blocks return tuples"),
    "mamba": Reading(
        sites=_RESIDUAL, unpackable="its state runs on from one rollout to the next", note="a state-space model"
    ),
    "llama4_text": Reading(sites=_RESIDUAL, note="4 experts in 1 of 2 layers, chunks of 16 in 3 of 4 layers"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A rollout with its spans, and the tokens that each reduction averages, written down by hand."""

    length: int
    mean: Segment
    last_prompt: Segment
    first_4: Segment
    spans: tuple[Span, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Spans overlap each other, and the mean."""
        return self.mean, self.last_prompt, self.first_4, *((span.start, span.stop) for span in self.spans)


def turn(number: int, start: int, stop: int, *, answer: int | None = None) -> tuple[Span, ...]:
    """Spans of one turn. It thinks until token ``answer``, if that is given."""
    parts = [("whole", start, stop)]
    parts += [("answer", start, stop)] if answer is None else [("think", start, answer), ("answer", answer, stop)]
    return tuple(Span(turn=number, part=part, start=first, stop=last) for part, first, last in parts)


SAMPLES = (
    Sample(
        length=40,
        mean=(20, 39),
        last_prompt=(19, 20),
        first_4=(20, 24),
        spans=turn(0, 5, 14, answer=8) + turn(1, 20, 39, answer=31),
    ),
    Sample(length=9, mean=(7, 9), last_prompt=(6, 7), first_4=(7, 9), spans=turn(0, 7, 9)),
    Sample(
        length=31,
        mean=(26, 31),
        last_prompt=(25, 26),
        first_4=(26, 30),
        spans=turn(0, 3, 4) + turn(1, 9, 21, answer=15) + turn(2, 26, 31),
    ),
    Sample(length=12, mean=(1, 12), last_prompt=(0, 1), first_4=(1, 5), spans=turn(0, 1, 12, answer=4)),
    Sample(length=23, mean=(18, 22), last_prompt=(17, 18), first_4=(18, 22), spans=turn(0, 18, 22)),
)


def samples_batch(*, packed: bool = False) -> MicroBatch:
    """SAMPLES with random tokens, segmented as extraction does it."""
    draw = random.Random(0)
    readout = Readout.of_arrays(plan_arrays(SITES, REDUCTIONS, None))
    assert max(sample.length for sample in SAMPLES) > 2 * SLIDING_WINDOW
    return MicroBatch(
        rows=tuple(range(len(SAMPLES))),
        token_ids=tuple(tuple(draw.randrange(3, 400) for _ in range(sample.length)) for sample in SAMPLES),
        segments=tuple(readout.segments(sample.spans) for sample in SAMPLES),
        packed=packed,
        begins=tuple(sample.mean[0] for sample in SAMPLES),
    )


class Family:
    """A tiny checkpoint of a family. What is loaded or computed of it is kept."""

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        self.name = name
        self.reading = READINGS[name]
        self.checkpoint = checkpoint
        self.load: Callable[..., Slice] = cache(self._load)
        self.means: Callable[..., list[NDArray[np.float32]]] = cache(self._means)
        self.truth: Callable[..., list[NDArray[np.float64]]] = cache(self._truth)

    @classmethod
    def tiny(cls, name: str, folder: Path) -> "Family":
        return cls(name, resolve(ModelConfig(id=str(tiny_checkpoint(folder, name, layers=LAYERS)))))

    @classmethod
    def calm(cls, name: str, folder: Path) -> "Family":
        """One whose blocks add little to a large stream, as trained ones do.

        Where they don't, each block multiplies the rounding errors of those before it, and routers choose other
        experts: a plain bfloat16 pass is then as far from the truth as ours.
        """
        file = tiny_checkpoint(folder, name, layers=LAYERS) / "model.safetensors"
        weights = load_file(file)
        for key, weight in weights.items():
            if key.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight")):
                weight *= 4
            elif weight.ndim > 1:
                weight *= 0.25
        save_file(weights, file, metadata={"format": "pt"})
        return cls(name, resolve(ModelConfig(id=str(folder))))

    def _load(self, first: int, stop: int, dtype: Dtype = "float32", compiled: bool = False) -> Slice:
        return load_slice(self.checkpoint, first=first, stop=stop, dtype=dtype, compiled=compiled)

    def _means(
        self,
        cut: tuple[int, ...] = CUTS[0],
        *,
        packed: bool = False,
        dtype: Dtype = "float32",
        hooks: Sequence[LayerHook] = (),
        compiled: bool = False,
    ) -> list[NDArray[np.float32]]:
        """Of each sample ``(Z, L, S, D)``, from a chain of stages; ``compiled`` reads the residual stream's sites."""
        batch, received_BTD, by_stage = samples_batch(packed=packed), None, []
        sites = _RESIDUAL if compiled else self.reading.sites
        for first, stop in pairwise(cut):
            with Stage(self.load(first, stop, dtype, compiled), last=stop == LAYERS, sites=sites, hooks=hooks) as stage:
                output = stage.forward(batch, received_BTD)
            assert output.parts == 1
            received_BTD = output.hidden_BTD
            by_stage.append(output.pooled())
        assert received_BTD is None
        return [np.concatenate([rows[row].means_SD for rows in by_stage], axis=1) for row in batch.rows]

    def _truth(self, *, dtype: Dtype = "float32", hooks: Sequence[LayerHook] = ()) -> list[NDArray[np.float64]]:
        """Of each sample ``(Z, L, S, D)``: a plain float32 model, its weights rounded to ``dtype``, one at a time."""
        model = AutoModel.from_pretrained(self.checkpoint.source, dtype=getattr(torch, dtype)).float().eval()
        seen: dict[tuple[str, int], NDArray[np.float64]] = {}
        blocks = model.get_submodule(self.reading.blocks)
        for hook in hooks:
            blocks[hook.layer].register_forward_hook(_change(hook))
        for layer, block in enumerate(blocks):
            block.register_forward_pre_hook(_keep_input(seen, ("resid_pre", layer)), with_kwargs=True)
            block.register_forward_hook(_keep_output(seen, ("resid_post", layer), 1.0))
            for site, module in (("attn_out", self.reading.attention), ("mlp_out", self.reading.mlp)):
                if site in self.reading.sites:
                    keep = _keep_output(seen, (site, layer), self.reading.scale)
                    block.get_submodule(module).register_forward_hook(keep)
        means = []
        for ids, sample in zip(samples_batch().token_ids, SAMPLES, strict=True):
            seen.clear()
            with torch.inference_mode():
                model(input_ids=torch.tensor([ids]))
            states_ZLTD = np.stack([[seen[site, layer] for layer in range(LAYERS)] for site in self.reading.sites])
            _check_the_truth(states_ZLTD, changed=[hook.layer for hook in hooks])
            means.append(np.stack([states_ZLTD[:, :, start:stop].mean(2) for start, stop in sample.segments], axis=2))
        return means


def _change(hook: LayerHook) -> Callable[..., Any]:
    def change(_: Any, __: Any, output: Any) -> Any:
        return (hook.change(output[0]), *output[1:]) if isinstance(output, tuple) else hook.change(output)

    return change


def _keep_input(seen: dict[tuple[str, int], NDArray[np.float64]], key: tuple[str, int]) -> Callable[..., None]:
    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[key] = (args[0] if args else kwargs["hidden_states"])[0].double().numpy()

    return keep


def _keep_output(
    seen: dict[tuple[str, int], NDArray[np.float64]], key: tuple[str, int], scale: float
) -> Callable[..., None]:
    def keep(_: Any, __: Any, output: Any) -> None:
        seen[key] = scale * (output[0] if isinstance(output, tuple) else output)[0].double().numpy()

    return keep


def _check_the_truth(states_ZLTD: NDArray[np.float64], changed: Sequence[int]) -> None:
    """A block adds what its attention and its MLP give to its input, and nothing else."""
    post_LTD, pre_LTD, *added_ZLTD = states_ZLTD
    np.testing.assert_array_equal(pre_LTD[1:], post_LTD[:-1])
    if not added_ZLTD:
        return
    whole = [layer for layer in range(LAYERS) if layer not in changed]
    missing_LTD = (post_LTD - pre_LTD - sum(added_ZLTD))[whole]
    assert np.linalg.norm(missing_LTD) <= 1e-6 * np.linalg.norm(post_LTD[whole])


def relative_error(got: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float64]]) -> float:
    """Norm of the difference over the norm: the largest of all samples, sites, layers and segments."""
    pairs = list(zip(got, expected, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max()) for a, b in pairs)


def cosine(got: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float64]]) -> float:
    """Of `resid_post_mean`: the smallest of all samples and layers."""
    site, segment = SITES.index("resid_post"), REDUCTIONS.index("mean")
    pairs = [(a[site, :, segment].astype(np.float64), b[site, :, segment]) for a, b in zip(got, expected, strict=True)]
    return min(
        float(((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).min()) for a, b in pairs
    )
