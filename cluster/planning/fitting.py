"""What fits on a device: bytes of a stage, of a generator's share, and the fewest stages that a model needs.

Pure functions. The terms, with D hidden, I intermediate, A width of all query heads, K of all key heads, w bytes of
one number, T tokens of a micro-batch:

- weights: the slice's parameters x w (`ModelShape.slice_bytes`).
- activations: T x (w (4 D + 3 I + 2 A + 2 K) + 8 D): the residual stream, received, passed on and normed; gate, up and
  their product; queries, keys, values and attention's output; float32 copies of norms and sums. Only one block's are
  alive at a time. Attention without a fused kernel holds its scores as well, heads x T x longest rollout x (w + 4).
  docs/benchmarks.md has 119 MB measured for 16 x 512 tokens of SmolLM2-135M, where this says 162 MB.
- pooled: sums on the device, segments x layers x D x 4 bytes, of two micro-batches: one is on its way to the host.
- workspace: what a process with CUDA and its libraries takes before any model; on CPUs, Python with torch and Ray.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from personaspace.extract.config import Attention, Dtype
from personaspace.extract.shape import BYTES_OF, ModelShape
from personaspace.store.layout import Layout

HEADROOM = 0.05
"""Share of a device's memory that stays free: fragments of the allocator."""
WORKSPACE = {"cuda": 1.2e9, "cpu": 0.6e9}
"""Bytes that a worker takes before any weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeed:
    """Bytes on one device, or on a generator's devices each."""

    weights: int
    activations: int
    """Of one micro-batch; of a generator also its cache of keys and values, and logits."""
    pooled: int
    """Sums on their way to the host."""
    workspace: int
    """Before any model is loaded."""

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.pooled + self.workspace

    def fits(self, memory_bytes: int) -> bool:
        """Whether it fits with head-room."""
        return self.total <= memory_bytes * (1 - HEADROOM)

    def headroom(self, memory_bytes: int) -> float:
        """Share of the device's memory that is left; negative where it does not fit."""
        return 1 - self.total / memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchLoad:
    """What one micro-batch asks of a stage."""

    tokens: int
    """Padding included."""
    longest: int
    """Tokens of its longest rollout."""
    segments: int
    """Sums taken of it at each layer and site."""
    fused_attention: bool
    """Attention never holds its scores."""


def fuses_attention(shape: ModelShape, attention: Attention) -> bool:
    """Whether the kernels of extraction never hold attention's scores."""
    return attention != "eager" and (attention != "auto" or not shape.eager_attention)


def layer_boundaries(shape: ModelShape, layer_group: int, stages: int) -> list[int]:
    """Where the layers are cut for so many stages: multiples of the layer group, as `store/layout.py` cuts them."""
    layout = Layout(segments=(1,), layers=shape.layers, hidden=shape.hidden, unit_rows=1, layer_group=layer_group)
    return layout.stage_boundaries(stages)


def layer_groups(shape: ModelShape, layer_group: int) -> int:
    """Groups that the layers lie in: the most stages there can be."""
    return -(-shape.layers // layer_group)


def activation_bytes(shape: ModelShape, dtype: Dtype, load: MicroBatchLoad) -> int:
    """Bytes alive in one block while a micro-batch passes, and its states on their way in and out."""
    width = BYTES_OF[dtype]
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_token = width * (4 * shape.hidden + 3 * shape.intermediate + 2 * queries + 2 * keys) + 8 * shape.hidden
    scores = 0 if load.fused_attention else shape.heads * load.longest * (width + 4)
    return load.tokens * (per_token + scores)


def stage_need(
    shape: ModelShape, dtype: Dtype, first: int, stop: int, load: MicroBatchLoad, kind: Literal["cuda", "cpu"]
) -> MemoryNeed:
    """What a stage of blocks ``[first, stop)`` takes of its device."""
    return MemoryNeed(
        weights=shape.slice_bytes(first, stop, dtype),
        activations=activation_bytes(shape, dtype, load),
        pooled=2 * load.segments * (stop - first) * shape.hidden * 4,
        workspace=int(WORKSPACE[kind]),
    )


def stage_needs(
    shape: ModelShape,
    dtype: Dtype,
    layer_group: int,
    stages: int,
    load: MicroBatchLoad,
    kind: Literal["cuda", "cpu"],
) -> list[MemoryNeed]:
    """What each of the stages takes."""
    return [
        stage_need(shape, dtype, first, stop, load, kind)
        for first, stop in pairwise(layer_boundaries(shape, layer_group, stages))
    ]


def fit_stages(
    shape: ModelShape,
    dtype: Dtype,
    load: MicroBatchLoad,
    memory_bytes: int,
    layer_group: int,
    kind: Literal["cuda", "cpu"] = "cuda",
) -> int | None:
    """Fewest stages of which each fits ``memory_bytes`` with head-room; None where one layer group is too much."""
    for stages in range(1, layer_groups(shape, layer_group) + 1):
        if all(need.fits(memory_bytes) for need in stage_needs(shape, dtype, layer_group, stages, load, kind)):
            return stages
    return None


def generator_need(
    shape: ModelShape,
    dtype: Dtype,
    size: int,
    *,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    kind: Literal["cuda", "cpu"],
) -> MemoryNeed:
    """What each of ``size`` devices takes that hold one model between them and decode ``rows`` rollouts together.

    Weights, cache and a block's inner states are divided; the residual stream and the logits are whole on each. The
    cache grows by copies (transformers' DynamicCache), one layer's at a time, so one layer is counted twice.
    """
    tokens = rows * prompt_tokens
    cache = shape.kv_bytes(dtype) * rows * (prompt_tokens + new_tokens) * (shape.layers + 1) // shape.layers
    load = MicroBatchLoad(tokens=tokens, longest=prompt_tokens, segments=0, fused_attention=not shape.eager_attention)
    whole = activation_bytes(shape, dtype, load)
    stream = tokens * shape.hidden * (4 * BYTES_OF[dtype] + 8)
    logits = rows * shape.vocabulary * (BYTES_OF[dtype] + 3 * 4)
    return MemoryNeed(
        weights=-(-shape.whole_bytes(dtype) // size),
        activations=-(-cache // size) + -(-(whole - stream) // size) + stream + logits,
        pooled=0,
        workspace=int(WORKSPACE[kind]),
    )


def divided(need: MemoryNeed, size: int) -> MemoryNeed:
    """What each of ``size`` devices takes that share the weights and inner states of one."""
    return MemoryNeed(
        weights=-(-need.weights // size), activations=need.activations, pooled=need.pooled, workspace=need.workspace
    )


def gang_sizes(shape: ModelShape, most: int) -> Iterator[int]:
    """Numbers of devices among which attention heads divide evenly, up to ``most``."""
    return (size for size in range(1, most + 1) if shape.heads % size == 0 and size & (size - 1) == 0)
