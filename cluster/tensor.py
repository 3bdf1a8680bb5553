"""Loading a model over a gang, each block cut by DeepSpeed's AutoTP and proven against the uncut one.

One block is loaded, run, cut, run again and compared before the next one is read. So a rank never holds more than its
share and one whole block, and a family that AutoTP cuts wrongly is refused whatever the size of the model. Hidden
states between and after attention and MLP are the same on all ranks, so hooks see what they would see in one process.
"""

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from personaspace.cluster.gang import Gang
from personaspace.extract.anatomy import UnsupportedModelError, dissect, empty_model
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Attention, Dtype
from personaspace.extract.quantization import check_plain
from personaspace.extract.slicing import PassThrough, Slice, load_pruned, load_slice
from personaspace.extract.stage import Stage
from personaspace.store.errors import InputError

_LENGTHS = (17, 9)
_ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative difference of a module's output from the uncut one: sums of partial products round otherwise. A wrong cut
changes it by about its own norm."""
_WHOLE = 0.5
"""Largest share of a block's weights that every rank may hold whole."""


def load_tensor_parallel(
    checkpoint: Checkpoint,
    gang: Gang,
    *,
    dtype: Dtype,
    attention: Attention = "auto",
    stop: int | None = None,
) -> Slice:
    """Blocks ``[0, stop)`` (default: all) as a slice of which this rank holds its share; all ranks call it together.

    Embedding and norms are whole on each rank. Raises InputError for more ranks than key-value heads, and
    UnsupportedModelError if weights are missing, or if DeepSpeed can't cut the blocks, cuts them wrongly, or leaves
    most of them whole.
    """
    check_plain(checkpoint.source, checkpoint.quantization, sharding="tensor")
    stop = checkpoint.layers if stop is None else stop

    def load(layer: int) -> Slice:
        device = str(gang.device)
        return load_slice(checkpoint, first=layer, stop=layer + 1, dtype=dtype, device=device, attention=attention)

    base = load(0)
    check_ranks(checkpoint.name, base.decoder.config, gang.ranks)
    _cut(base, base.decoder, gang)
    for layer in range(1, stop):
        piece = load(layer)
        _cut(piece, piece.decoder, gang)
        base.blocks[layer] = piece.blocks[layer]
    return replace(base, stop=stop)


def load_causal_lm_parallel(checkpoint: Checkpoint, gang: Gang, *, dtype: Dtype) -> PreTrainedModel:
    """The whole model with its head, for generation; all ranks call it together, and run it together.

    The head is cut too. Raises as `load_tensor_parallel` does.
    """

    def leave_first_block(model: PreTrainedModel) -> None:
        blocks = dissect(model, checkpoint.layers).blocks
        for layer in range(1, checkpoint.layers):
            blocks[layer] = PassThrough(blocks[layer])

    check_plain(checkpoint.source, checkpoint.quantization, sharding="tensor")
    model = load_pruned(
        checkpoint,
        empty_model(checkpoint, head=True),
        leave_first_block,
        name="the first layer, embedding and head",
        dtype=dtype,
        attention="auto",
        device_map=str(gang.device),
    )
    parts = dissect(model, checkpoint.layers)
    check_ranks(checkpoint.name, parts.decoder.config, gang.ranks)
    base = Slice(
        first=0,
        stop=1,
        hidden=checkpoint.hidden,
        dtype=getattr(torch, dtype),
        device=gang.device,
        decoder=parts.decoder,
        blocks=parts.blocks,
        compiled=False,
    )
    ids_BT = torch.arange(24, device=gang.device).reshape(2, 12)
    before = _logits(model, ids_BT)
    _cut(base, model, gang)
    error = gang.largest(_difference(_logits(model, ids_BT), before))
    if not error <= _ROUNDING[base.dtype]:
        raise _refusal(model, f"cut by DeepSpeed, its logits differ by {error:.1%} from those of the uncut model")
    for layer in range(1, checkpoint.layers):
        piece = load_slice(checkpoint, first=layer, stop=layer + 1, dtype=dtype, device=str(gang.device))
        _cut(piece, piece.decoder, gang)
        base.blocks[layer] = piece.blocks[layer]
    return model


def check_ranks(name: str, config: Any, ranks: int) -> None:
    """Raise InputError for more ranks than the model has key-value heads: some would have no part in attention.

    Where they don't divide the heads, some ranks hold more than others.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if ranks > heads:
        raise InputError(
            f"{name} has {heads} key-value heads, so {ranks} ranks can't share them; at most {heads} can, and evenly "
            f"those that divide {heads}."
        )


def _cut(piece: Slice, holder: PreTrainedModel, gang: Gang) -> None:
    """Replace the piece's one block by this rank's share of it; ``holder`` is the model that it is part of."""
    block = piece.blocks[piece.first]
    name = f"{type(block).__name__} (layer {piece.first})"
    numel = _numel(block)
    before = _outputs(piece)
    try:
        _autotp(holder, gang)
        after = _outputs(piece)
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise _refusal(holder, f"DeepSpeed can't cut {name}: {error}") from error
    # A module whose output is cut itself has another shape; what it leads to is compared all the same.
    errors = {
        path: _difference(after[path], before[path]) for path in before if after[path].shape == before[path].shape
    }
    worst = gang.largest(max(errors.values()))
    if not worst <= _ROUNDING[piece.dtype]:
        path = max(errors, key=lambda path: errors[path])
        raise _refusal(
            holder, f"DeepSpeed cuts {name} wrongly: {path or 'its output'} differs by {worst:.1%} from the uncut one"
        )
    whole = (gang.sum(_numel(piece.blocks[piece.first])) - numel) / (gang.ranks - 1) / numel
    if whole > _WHOLE:
        raise _refusal(
            holder, f"DeepSpeed leaves {whole:.0%} of the weights of {name} whole on every rank (experts, as a rule)"
        )
    for weight in piece.blocks[piece.first].parameters():
        # What is not cut may still be a view of the checkpoint's file, and keep all that was read of it in memory.
        weight.data = weight.data.clone()


def _autotp(model: PreTrainedModel, gang: Gang) -> None:
    from deepspeed.inference.config import DeepSpeedInferenceConfig
    from deepspeed.module_inject import replace_transformer_layer
    from deepspeed.module_inject.auto_tp import AutoTP

    # These are the steps of init_inference without its engine, which would cast what has to stay in float32.
    with redirect_stdout(StringIO()):
        for block_class, reduced in AutoTP.tp_parser(model):
            # Grain 1: with its default of 64 a rank may get much more of a small MLP than another, or all of it.
            parallel = {"tp_size": gang.ranks, "tp_group": gang.group, "tp_grain_size": 1}
            config = DeepSpeedInferenceConfig(tensor_parallel=parallel, dtype=model.dtype)
            config.injection_policy_tuple = tuple(reduced)
            replace_transformer_layer(block_class, model, None, config, model.config)


def _outputs(piece: Slice) -> dict[str, torch.Tensor]:
    """What the piece's block and the modules in it give for random states, in float32; the block's own path is ''."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, torch.Tensor):
                seen[path] = states.float().clone()

        return hook

    block = piece.blocks[piece.first]
    handles = [module.register_forward_hook(keep(path)) for path, module in [("", block), *block.named_children()]]
    try:
        with Stage(piece, last=False) as stage:
            stage.run_decoder(*stage.probe(_LENGTHS))
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.inference_mode()
def _logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits.float().clone()
    return logits_BTV


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected.norm() or 1.0))


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _refusal(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}: {why}. Set cluster.sharding to `pipeline`, or to `offload`; for generation use an "
        "engine of its own with tensor parallel, such as vLLM."
    )
