"""Where a decoder keeps its embedding, blocks and final norm, found from the model itself.

transformers names them for many families (`base_model_pp_plan`); otherwise the module tree tells. Everything that
reads or changes a model from inside finds its way by this module.
"""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from personaspace.extract.checkpoint import Checkpoint
from personaspace.store.errors import PersonaspaceError

_WITH_HEAD = (AutoModelForCausalLM, AutoModelForImageTextToText)


class UnsupportedModelError(PersonaspaceError):
    """The model's structure is not that of a decoder whose residual stream can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """The parts of a decoder-only language model."""

    decoder: PreTrainedModel
    """Turns token ids into the residual stream: the backbone, or the text side of a model of several modalities."""
    embedding: nn.Module
    """Token ids to the states that enter the first block."""
    blocks: nn.ModuleList
    """One module per layer."""
    norm_path: str | None
    """Name of the final norm in the decoder; None where it has none."""


def dissect(backbone: PreTrainedModel, layers: int) -> Anatomy:
    """Find the parts of a model without its head.

    Raises UnsupportedModelError naming the model class and the reason.
    """
    if getattr(backbone.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(backbone).__name__}: an encoder-decoder; only decoder-only language models can be used."
        )
    decoder = backbone.get_decoder()
    plan = getattr(decoder.config, "base_model_pp_plan", None) or {}
    planned = [name for name in plan if _is_list_of(getattr(decoder, name, None), layers)]
    path = planned[0] if len(planned) == 1 else _find_blocks(decoder, layers)
    blocks = decoder.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return Anatomy(
        decoder=decoder,
        embedding=decoder.get_input_embeddings(),
        blocks=blocks,
        norm_path=_find_norm(decoder, path),
    )


def empty_model(checkpoint: Checkpoint, *, head: bool = False) -> PreTrainedModel:
    """The backbone without weights, or the whole model with its head: tells class and structure at no cost."""
    return build_empty(checkpoint.config(), checkpoint.source, checkpoint.trust_remote_code, head=head)


def build_empty(config: Any, source: str, trust_remote_code: bool = False, *, head: bool = False) -> PreTrainedModel:
    """What ``config`` describes, without weights; with its head, if asked. Raises UnsupportedModelError naming
    ``source``."""
    refusal: ValueError | None = None
    for kind in (*_WITH_HEAD, AutoModel) if head else (AutoModel,):
        try:
            with init_empty_weights():
                model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code)
            return model
        except ValueError as error:
            refusal = error
    raise UnsupportedModelError(f"{source}: transformers has no model for {config.model_type}: {refusal}") from refusal


def check_supported(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError for a checkpoint whose structure can't be used, before anything is loaded."""
    dissect(empty_model(checkpoint), checkpoint.layers)


def _find_blocks(decoder: PreTrainedModel, layers: int) -> str:
    """Name of the shallowest ModuleList with one entry per layer."""
    candidates = [name for name, module in decoder.named_modules() if _is_list_of(module, layers)]
    depth = min((name.count(".") for name in candidates), default=0)
    found = [name for name in candidates if name.count(".") == depth]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(decoder).__name__}: found {len(found)} lists of {layers} blocks, expected one; "
            "this architecture is not supported."
        )
    return str(found[0])


def _find_norm(decoder: PreTrainedModel, blocks_path: str) -> str | None:
    """The last norm beside the blocks: a child whose own weights are vectors only."""
    parent_path, _, own_name = blocks_path.rpartition(".")
    names = [name for name, _ in decoder.get_submodule(parent_path).named_children()]
    for name in reversed(names[names.index(own_name) + 1 :]):
        path = f"{parent_path}.{name}".removeprefix(".")
        weights = list(decoder.get_submodule(path).parameters())
        if weights and all(weight.ndim == 1 for weight in weights):
            return path
    return None


def _is_list_of(module: Any, length: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == length


def states_of(output: torch.Tensor | tuple[Any, ...]) -> torch.Tensor:
    """The hidden states in what a block, an attention or an MLP returns."""
    states = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(states, torch.Tensor)
    return states
