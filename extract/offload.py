"""Running a model that is larger than the device: blocks wait in CPU memory or on disk, and visit the device in turn.

accelerate's hooks bring the weights of one module at a time to the device and drop them again. On disk, weights are
read from where the checkpoint has them; only those that transformers stores otherwise than the checkpoint does (experts
fused into one tensor, for example) are written anew, to the offload folder.
"""

import logging
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from personaspace.extract.anatomy import UnsupportedModelError, dissect, empty_model
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Attention, Dtype
from personaspace.extract.quantization import check_plain
from personaspace.extract.slicing import Slice, load_pruned, prune
from personaspace.store.errors import InputError

# It warns of what is asked for here: parameters without values in the model itself.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Where blocks wait that the device has no room for."""

    to: Literal["cpu", "disk"]
    """`disk`: the checkpoint's own files, wherever they can be used as they are."""
    folder: Path | None = None
    """Where weights go that can't be read from the checkpoint as they are; a folder of its own is made inside, and
    removed with the model. None: such a model is refused."""
    keep: int | None = None
    """Bytes of weights that stay on the device, rounded down to whole blocks, what lies outside of blocks apart.
    Default: half of what a GPU has free, and nothing where the device is the CPU."""


def load_offloaded(
    checkpoint: Checkpoint,
    offload: Offload,
    *,
    dtype: Dtype,
    device: str = "cpu",
    attention: Attention = "auto",
    stop: int | None = None,
) -> Slice:
    """Blocks ``[0, stop)`` (default: all) as a slice that runs on ``device`` and keeps most of its weights elsewhere.

    Numbers are those of `load_slice`: the same kernels run on the same device. Every pass brings every block to the
    device once, so large micro-batches are the fast ones. Raises InputError if there is nowhere to offload to, and
    UnsupportedModelError for weights that are missing or can't be loaded.
    """
    stop = checkpoint.layers if stop is None else stop

    def pruned(backbone: PreTrainedModel) -> None:
        prune(backbone, checkpoint.layers, range(stop))

    model = _load(
        checkpoint,
        offload,
        empty_model(checkpoint),
        pruned,
        name=f"layers 0 to {stop - 1}",
        dtype=dtype,
        device=device,
        attention=attention,
    )
    parts = dissect(model, checkpoint.layers)
    return Slice(
        first=0,
        stop=stop,
        hidden=checkpoint.hidden,
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        decoder=parts.decoder,
        blocks=parts.blocks,
        compiled=False,
    )


def load_causal_lm_offloaded(
    checkpoint: Checkpoint, offload: Offload, *, dtype: Dtype, device: str = "cpu"
) -> PreTrainedModel:
    """The whole model with its head, for generation; every token that is decoded brings every block to the device.

    Raises as `load_offloaded` does.
    """
    whole = empty_model(checkpoint, head=True)
    return _load(
        checkpoint,
        offload,
        whole,
        lambda _: None,
        name="the model",
        dtype=dtype,
        device=device,
        attention="auto",
    )


def _load(
    checkpoint: Checkpoint,
    offload: Offload,
    whole: PreTrainedModel,
    pruned: Callable[[PreTrainedModel], None],
    *,
    name: str,
    dtype: Dtype,
    device: str,
    attention: Attention,
) -> PreTrainedModel:
    if offload.to == "cpu" and torch.device(device).type == "cpu":
        raise InputError(
            "cluster.offload_to: cpu, but the model runs on the CPU already, so nothing would be offloaded. "
            "Set it to `disk`, or cluster.sharding to `pipeline`."
        )
    check_plain(checkpoint.source, checkpoint.quantization, sharding="offload")
    own = None
    if offload.folder is not None and offload.to == "disk":
        offload.folder.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(dir=offload.folder, prefix="personaspace-", ignore_cleanup_errors=True)
    config = whole.config
    pruned(whole)
    try:
        model = load_pruned(
            checkpoint,
            whole,
            pruned,
            name=name,
            dtype=dtype,
            attention=attention,
            device_map=_places(whole, checkpoint.layers, offload, getattr(torch, dtype), device),
            offload_folder=None if own is None else own.name,
        )
    except UnsupportedModelError as error:
        if own is not None:
            own.cleanup()
        elif offload.to == "disk" and "re-saved" in str(error):
            raise InputError(
                f"{checkpoint.source}: a {config.model_type} checkpoint stores weights otherwise than the model holds "
                "them, so they can't be read from it one by one. Set cluster.offload_folder to a folder with room for "
                "another copy of the weights, or run the model with pipeline stages."
            ) from error
        raise
    if own is not None:
        # The blocks and not the model, of which a slice keeps the text side only.
        weakref.finalize(dissect(model, checkpoint.layers).blocks, own.cleanup)
    return model


def _places(model: PreTrainedModel, layers: int, offload: Offload, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Module -> where its weights are: what lies outside of blocks on the device, and as many blocks as may stay."""
    blocks = dissect(model, layers).blocks
    path = next(name for name, module in model.named_modules() if module is blocks)
    places: dict[str, Any] = {}
    # A module that holds the blocks is left out: accelerate would bring all of it to the device.
    for name in _names(model):
        holds_blocks = name == path or path.startswith(f"{name}.")
        is_placed = any(name.startswith(f"{placed}.") for placed in places)
        if not (holds_blocks or is_placed or name.startswith(f"{path}.")):
            places[name] = device
    room = _room(offload, device)
    for number, block in enumerate(blocks):
        room -= sum(weight.numel() for weight in block.parameters()) * dtype.itemsize
        places[f"{path}.{number}"] = device if room >= 0 else offload.to
    return places


def _names(model: nn.Module) -> list[str]:
    tensors = [name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named]
    return [name for name, _ in model.named_modules() if name] + tensors


def _room(offload: Offload, device: str) -> int:
    if offload.keep is not None:
        return offload.keep
    return torch.cuda.mem_get_info(device)[0] // 2 if torch.device(device).type == "cuda" else 0
