"""Loading a slice of a checkpoint: only the weights of its own blocks are ever read, from the files that hold them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from personaspace.extract.anatomy import UnsupportedModelError, dissect, empty_model
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import Attention, Dtype
from personaspace.extract.quantization import check_packages
from personaspace.extract.weights import local_folder, slice_files
from personaspace.store.errors import InputError

OLDEST = (5, 20)
"""Version of transformers whose models are read as docs/models.md says."""


class PassThrough(nn.Module):
    """Stands where a module of no use to the slice would be; owns no weights, and gives back what it gets first."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # Some models read this attribute of every block to choose its mask.
        if hasattr(replaced, "attention_type"):
            self.attention_type = replaced.attention_type

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states.as_subclass(_Passed)


class _Passed(torch.Tensor):
    """States from a pass-through, good for a model whose blocks return tensors and for one that takes ``output[0]``.

    No block sees it: the first own one gets the received states, and nothing is read behind the last.
    """

    # What is computed from it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.as_subclass(torch.Tensor))


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Some blocks of a model, loaded."""

    first: int
    stop: int
    """Its blocks are ``[first, stop)``."""
    hidden: int
    dtype: torch.dtype
    device: torch.device
    decoder: PreTrainedModel
    blocks: nn.ModuleList
    """All of the model's; pass-throughs outside of the slice."""
    compiled: bool
    """Blocks run as torch.compile makes them; what happens inside of them can't be read."""

    def __post_init__(self) -> None:
        found = transformers.__version__
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            # 5.19 and packed rollouts of Llama 4, for one: activations 155% off, without a word.
            raise InputError(
                f"transformers: {found} is for generation only (vLLM asks for it); reading activations takes "
                f"{OLDEST[0]}.{OLDEST[1]} or newer. Run `personaspace extract` in an environment that has it."
            )


def load_slice(
    checkpoint: Checkpoint,
    *,
    first: int,
    stop: int,
    dtype: Dtype,
    device: str = "cpu",
    attention: Attention = "auto",
    compiled: bool = False,
) -> Slice:
    """The decoder with only the weights of blocks ``[first, stop)``; the embedding only where ``first`` is 0.

    Blocks outside the slice, the final norm, and what is not text are pass-throughs. The model is pruned before
    transformers loads it, so that tensors of other stages are never read, while transformers' own weight conversions
    and quantizers stay in force. Of a Hugging Face id only the files that hold the slice's weights are downloaded, once
    for all processes of a machine. ``compiled`` has torch.compile make one kernel for all blocks of a kind, when the
    slice first runs. Raises UnsupportedModelError for weights that are missing or can't be loaded, and InputError for a
    file that can't be downloaded or a package that quantised weights need.
    """
    # Names in a quantisation's config are those of the model with its head.
    model = load_pruned(
        checkpoint,
        empty_model(checkpoint, head=checkpoint.quantization is not None),
        lambda model: prune(model, checkpoint.layers, range(first, stop)),
        name=f"layers {first} to {stop - 1}",
        dtype=dtype,
        attention=attention,
        device_map=device,
    )
    parts = dissect(model, checkpoint.layers)
    for block in parts.blocks[first:stop] if compiled else ():
        # Not the module: hooks on a block see its states outside of what is compiled.
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)
    return Slice(
        first=first,
        stop=stop,
        hidden=checkpoint.hidden,
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        decoder=parts.decoder,
        blocks=parts.blocks,
        compiled=compiled,
    )


def load_pruned(
    checkpoint: Checkpoint,
    whole: PreTrainedModel,
    prune: Callable[[PreTrainedModel], None],
    *,
    name: str,
    dtype: Dtype,
    attention: Attention,
    **placing: Any,
) -> PreTrainedModel:
    """The model of which ``whole`` is the empty form, without what ``prune`` takes out of it before it is loaded.

    ``name`` stands for what is left in messages; ``placing`` tells `from_pretrained` where weights go. Raises as
    `load_slice` does.
    """
    check_packages(checkpoint.source, checkpoint.quantization)
    whole_class: type[PreTrainedModel] = type(whole)
    folder = local_folder(checkpoint, whole.config)

    def load_rest(
        model: PreTrainedModel, state_dict: Any, files: list[str], load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Only now: a quantizer chooses the modules that it replaces by looking at the whole model.
        prune(model)
        files = slice_files(model, checkpoint, folder, files, load_config)
        return whole_class._load_pretrained_model(
            model, state_dict if files else {}, files, load_config, *args, **kwargs
        )

    overrides = {
        "_load_pretrained_model": staticmethod(load_rest),
        # With another module transformers takes the class for custom code and skips its weight conversions.
        "__module__": whole_class.__module__,
        # Tensors of other stages are unexpected on purpose.
        "_keys_to_ignore_on_load_unexpected": [r".*"],
    }
    pruned: Any = type(whole_class.__name__, (whole_class,), overrides)
    try:
        model, loading = pruned.from_pretrained(
            folder,
            config=whole.config,
            dtype=getattr(torch, dtype),
            attn_implementation=None if attention == "auto" else attention,
            output_loading_info=True,
            trust_remote_code=checkpoint.trust_remote_code,
            **placing,
        )
    except (RuntimeError, ValueError, ImportError, AttributeError, OSError) as error:
        raise UnsupportedModelError(f"{checkpoint.source}: transformers cannot load {name}: {error}") from error
    if loading["missing_keys"]:
        # transformers would fill them with random numbers and only warn.
        missing = ", ".join(sorted(loading["missing_keys"])[:5])
        raise UnsupportedModelError(
            f"{checkpoint.source}: {len(loading['missing_keys'])} weights of {name} are not in the checkpoint "
            f"({missing}, ...)."
        )
    for hook in list(model._forward_pre_hooks.values()) if checkpoint.quantization else ():
        # What a quantizer does before the first pass of the whole model, which is never run as such.
        hook(model, ())
    return cast(PreTrainedModel, model.eval())


def prune(backbone: PreTrainedModel, layers: int, owned: Sequence[int]) -> None:
    """Leave only what the blocks ``owned`` need: no other blocks, no final norm, the embedding only with block 0."""
    parts = dissect(backbone, layers)
    for layer in range(layers):
        if layer not in owned:
            parts.blocks[layer] = PassThrough(parts.blocks[layer])
    if parts.norm_path is not None:
        parts.decoder.set_submodule(parts.norm_path, PassThrough(parts.decoder.get_submodule(parts.norm_path)))
    if owned[0] > 0:
        parts.decoder.set_input_embeddings(PassThrough(parts.embedding))
    _keep_only(backbone, parts.decoder)
    left = backbone.state_dict()
    # A weight can't be tied to one that is gone.
    backbone.all_tied_weights_keys = {
        target: source for target, source in backbone.all_tied_weights_keys.items() if {target, source} <= left.keys()
    }


def _keep_only(module: nn.Module, decoder: nn.Module) -> None:
    """Drop everything outside of the decoder, such as vision towers."""
    if module is decoder:
        return
    for name, child in module.named_children():
        if any(part is decoder for part in child.modules()):
            _keep_only(child, decoder)
        else:
            setattr(module, name, PassThrough(child))
