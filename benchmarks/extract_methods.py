"""Ways to get every layer's mean over the response: ours, and those that it is measured against.

All run the same rollouts with the same backbone. Shape suffixes: B batch, T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM

from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Dtype
from personaspace.extract.packing import MicroBatch, form_batches
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage

REFERENCE_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One rollout: its tokens, and where its response begins."""

    ids: tuple[int, ...]
    response: int


def make_batches(rollouts: Sequence[Tokens], token_budget: int) -> list[MicroBatch]:
    """Micro-batches as a run forms them, with the response mean."""
    return form_batches(
        {row: rollout.ids for row, rollout in enumerate(rollouts)},
        {row: ((rollout.response, len(rollout.ids)),) for row, rollout in enumerate(rollouts)},
        token_budget,
        packed=False,
    )


def given_order(rollouts: Sequence[Tokens]) -> list[MicroBatch]:
    """Batches of 16 in the order in which the rollouts come."""
    return [
        MicroBatch(
            rows=tuple(range(start, start + len(part))),
            token_ids=tuple(rollout.ids for rollout in part),
            segments=tuple(((rollout.response, len(rollout.ids)),) for rollout in part),
        )
        for start in range(0, len(rollouts), REFERENCE_ROWS)
        for part in [rollouts[start : start + REFERENCE_ROWS]]
    ]


def ours(checkpoint: Checkpoint, dtype: Dtype, *, compiled: bool = False) -> Callable[[MicroBatch], object]:
    """Our engine, all layers in one stage; ``compiled`` as with `extract.compile`."""
    stage = Stage(load_slice(checkpoint, first=0, stop=checkpoint.layers, dtype=dtype, compiled=compiled))
    return lambda batch: stage.forward(batch).pooled()


def bare(checkpoint: Checkpoint, dtype: Dtype) -> Callable[[MicroBatch], object]:
    """The limit: the backbone alone, padded to the right, without a mask; nothing is read."""
    model = AutoModel.from_pretrained(checkpoint.source, dtype=getattr(torch, dtype)).eval()
    return torch.inference_mode()(lambda batch: model(input_ids=_padded(batch)[0], use_cache=False))


def hidden_states(checkpoint: Checkpoint, dtype: Dtype) -> Callable[[MicroBatch], object]:
    """The usual way: the chat model as it is loaded, `output_hidden_states=True`, then means in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(batch: MicroBatch) -> list[torch.Tensor]:
        ids_BT, mask_BT = _padded(batch)
        states = model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True)
        return [
            torch.stack([h_BTD[row, start:stop].float().mean(0) for h_BTD in states.hidden_states[1:]])
            for row, ((start, stop),) in enumerate(batch.segments)
        ]

    return run


def reference(checkpoint: Checkpoint, dtype: Dtype) -> Callable[[MicroBatch], object]:
    """As the assistant-axis pipeline does it: hooks keep every layer, all are stacked, the head runs, means follow."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.source, dtype=getattr(torch, dtype)).eval()
    kept: list[torch.Tensor] = []

    def keep(_: object, __: object, output: Any) -> None:
        kept.append(output if isinstance(output, torch.Tensor) else output[0])

    for block in model.get_decoder().layers:
        block.register_forward_hook(keep)

    @torch.inference_mode()
    def run(batch: MicroBatch) -> list[torch.Tensor]:
        ids_BT, mask_BT = _padded(batch)
        kept.clear()
        model(input_ids=ids_BT, attention_mask=mask_BT)
        h_LBTD = torch.stack(kept)
        return [h_LBTD[:, row, start:stop].mean(dim=1) for row, ((start, stop),) in enumerate(batch.segments)]

    return run


def _padded(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.zeros(batch.shape, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(batch.token_ids):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return ids_BT, mask_BT
