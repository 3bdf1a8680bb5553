"""A slice of a model: loads only its own blocks, and pools the residual stream after each of them.

The blocks before and after the slice become pass-throughs, and the states received from the previous stage are
spliced in before the first own block; embedding scale, rotary tables and masks stay the model's own business.
Shape suffixes: B rows of the micro-batch, T padded tokens, D hidden, L layers of the stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from personaspace.extract.anatomy import UnsupportedModelError, find_blocks
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Dtype
from personaspace.extract.packing import MicroBatch
from personaspace.extract.pooling import SpanMeans, span_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutput:
    """What one micro-batch gives at one stage."""

    hidden_BTD: torch.Tensor | None
    """Residual stream after the stage's last block, for the next stage; None from the last stage."""
    means_BLD: NDArray[np.float32]
    """Span means of the stage's layers, on the host."""


class Stage:
    """Blocks ``[first, stop)`` of a checkpoint on one device. Knows nothing of other processes.

    With ``first=0`` and ``stop=checkpoint.layers`` it is the whole backbone. `lm_head` is never loaded.
    """

    def __init__(self, checkpoint: Checkpoint, *, first: int, stop: int, dtype: Dtype, device: str = "cpu") -> None:
        self.first, self.stop = first, stop
        self.is_last = stop == checkpoint.layers
        self.device = torch.device(device)
        self._hidden = checkpoint.hidden
        self._model = load_slice(checkpoint, first=first, stop=stop, dtype=dtype, device=self.device)
        self._received_BTD: torch.Tensor | None = None
        self._leaving_BTD: torch.Tensor | None = None
        self._means: SpanMeans | None = None
        blocks = find_blocks(self._model, checkpoint.layers)
        if first > 0:
            blocks[first].register_forward_pre_hook(self._splice, with_kwargs=True)
        for layer in range(first, stop):
            blocks[layer].register_forward_hook(self._observe(layer))

    @torch.inference_mode()
    def forward(self, batch: MicroBatch, received_BTD: torch.Tensor | None = None) -> StageOutput:
        """Run one micro-batch through the stage's blocks.

        ``received_BTD`` is the previous stage's ``hidden_BTD``; the first stage embeds token ids instead.
        """
        rows, length = len(batch.rows), batch.padded_length
        self._means = SpanMeans(self.stop - self.first, span_weights(batch.spans, length, self.device), self._hidden)
        # Right padding needs no mask under causal attention, and without one the fused causal kernels run.
        if received_BTD is None:
            ids_BT = torch.zeros((rows, length), dtype=torch.long)
            for row, ids in enumerate(batch.token_ids):
                ids_BT[row, : len(ids)] = torch.tensor(ids)
            self._model(input_ids=ids_BT.to(self.device), use_cache=False)
        else:
            self._received_BTD = received_BTD.to(self.device)
            self._model(inputs_embeds=self._received_BTD, use_cache=False)
        means_BLD = self._means.means_LBD.transpose(0, 1).cpu().numpy()
        leaving_BTD = None if self.is_last else self._leaving_BTD
        self._received_BTD = self._leaving_BTD = self._means = None
        return StageOutput(hidden_BTD=leaving_BTD, means_BLD=means_BLD)

    def _splice(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._received_BTD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received_BTD}

    def _observe(self, layer: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            h_BTD = output if isinstance(output, torch.Tensor) else output[0]
            assert self._means is not None
            self._means.add(layer - self.first, h_BTD)
            if layer == self.stop - 1:
                self._leaving_BTD = h_BTD

        return hook


class PassThrough(nn.Module):
    """Stands where a block or the embedding of another stage would be; owns no weights."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # Some models read this attribute of every block to choose its mask.
        if hasattr(replaced, "attention_type"):
            self.attention_type = replaced.attention_type

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def load_slice(checkpoint: Checkpoint, *, first: int, stop: int, dtype: Dtype, device: torch.device) -> PreTrainedModel:
    """The backbone with only the weights of blocks ``[first, stop)``; the embedding only where ``first`` is 0.

    The model is pruned before transformers loads it, so that tensors of other stages are never read, while
    transformers' own weight conversions stay in force.
    """
    config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.loading())
    with init_empty_weights():
        whole = AutoModel.from_config(config, trust_remote_code=checkpoint.trust_remote_code)
    backbone_class: type[PreTrainedModel] = type(whole)

    def prune_on_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        backbone_class.__init__(self, *args, **kwargs)
        _prune(self, checkpoint.layers, range(first, stop))

    overrides = {
        "__init__": prune_on_init,
        # With another module transformers takes the class for custom code and skips its weight conversions.
        "__module__": backbone_class.__module__,
        # Tensors of other stages are unexpected on purpose.
        "_keys_to_ignore_on_load_unexpected": [r".*"],
    }
    sliced: Any = type(backbone_class.__name__, (backbone_class,), overrides)
    try:
        model, loading = sliced.from_pretrained(
            checkpoint.source,
            config=config,
            dtype=getattr(torch, dtype),
            device_map=str(device),
            output_loading_info=True,
            **checkpoint.loading(),
        )
    except (RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{checkpoint.source}: transformers cannot load layers {first} to {stop - 1}: {error}"
        ) from error
    if loading["missing_keys"]:
        # transformers would fill them with random numbers and only warn.
        missing = ", ".join(sorted(loading["missing_keys"])[:5])
        raise UnsupportedModelError(
            f"{checkpoint.source}: {len(loading['missing_keys'])} weights of layers {first} to {stop - 1} are not in "
            f"the checkpoint ({missing}, ...)."
        )
    return cast(PreTrainedModel, model.eval())


def _prune(model: PreTrainedModel, layers: int, owned: Sequence[int]) -> None:
    blocks = find_blocks(model, layers)
    for layer in range(layers):
        if layer not in owned:
            blocks[layer] = PassThrough(blocks[layer])
    if owned[0] > 0:
        model.set_input_embeddings(PassThrough(model.get_input_embeddings()))
