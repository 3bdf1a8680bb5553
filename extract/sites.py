"""Where attention and MLP add to the residual stream, found by watching one forward pass.

Families differ in what lies between a sublayer and the addition: norms (Gemma 2, OLMo 2), dropouts (Phi-3), factors
(Granite). So outputs are followed through the modules that take them, and the result must explain the block:
``resid_post = resid_pre + attn_out + mlp_out``; otherwise the model is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personaspace.extract.anatomy import UnsupportedModelError, states_of
from personaspace.extract.config import Site
from personaspace.store.errors import InputError

INNER_SITES: tuple[Site, ...] = ("attn_out", "mlp_out")
"""Sites that lie inside of a block."""
_ATTENTION_NAMES = ("attn", "self_attn", "attention", "self_attention")
_TOLERANCE = 0.01
"""Of a sublayer's own norm: a wrong module misses by about that norm itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Addition:
    """A module whose output, times a factor, is added to the residual stream."""

    module: nn.Module
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Call:
    """One call of a block's child while it was watched."""

    name: str
    module: nn.Module
    took: torch.Tensor
    gave: torch.Tensor
    value: torch.Tensor
    """Copy of ``gave`` from that moment, in float32: blocks may add in place."""

    def feeds(self, other: "_Call") -> bool:
        return self.gave.data_ptr() == other.took.data_ptr() and self.gave.shape == other.took.shape


def check_compilable(sites: Sequence[Site]) -> None:
    """Raise InputError for sites that compiled blocks hide."""
    inner = [site for site in sites if site in INNER_SITES]
    if inner:
        raise InputError(
            f"extract.compile: compiled blocks can't be read inside, where {', '.join(inner)} "
            f"{'is' if len(inner) == 1 else 'are'}. Leave compile out, or read resid_post and resid_pre only."
        )


def find_additions(blocks: Mapping[int, nn.Module], probe: Callable[[], None]) -> dict[tuple[int, Site], Addition]:
    """(layer, `attn_out` or `mlp_out`) -> what adds it, for every block; ``probe`` runs the model once.

    Raises UnsupportedModelError for a block that adds anything else to its input.
    """
    watched = {layer: _Watched(block) for layer, block in blocks.items()}
    try:
        probe()
    finally:
        for watch in watched.values():
            watch.end()
    return {(layer, site): found for layer, watch in watched.items() for site, found in watch.explain(layer).items()}


class _Watched:
    """What happens inside one block during one forward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._calls: list[_Call] = []
        self._entered = self._left = torch.empty(0)
        self._handles = [
            block.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.register_forward_hook(self._leave),
        ]
        for name, child in block.named_children():
            self._handles.append(child.register_forward_hook(self._call(name), with_kwargs=True))

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def explain(self, layer: int) -> dict[Site, Addition]:
        """The two additions that make the block's output from its input."""
        name = type(self._block).__name__
        attention = [call for call in self._calls if _is_attention(call)]
        if len(attention) != 1:
            raise UnsupportedModelError(
                f"{name} (layer {layer}): {len(attention)} attention modules, expected one, so attn_out and mlp_out "
                f"can't be told apart; its modules are {[call.name for call in self._calls]}. Use resid_pre and "
                "resid_post."
            )
        attn_chain = self._follow(attention[0])
        attn = attn_chain[-1]
        scales = {1.0, float(getattr(self._block, "residual_multiplier", 1.0))}
        ends = [self._follow(call)[-1] for call in self._calls if call not in attn_chain]
        for mlp in ends:
            for scale in scales:
                if mlp is not attn and self._adds_up(attn, mlp, scale):
                    return {
                        "attn_out": Addition(module=self._source(attn).module, scale=scale),
                        "mlp_out": Addition(module=self._source(mlp).module, scale=scale),
                    }
        raise UnsupportedModelError(
            f"{name} (layer {layer}): no module's output, added to the block's input together with that of "
            f"{attn.name}, gives the block's output, so attn_out and mlp_out can't be read. Use resid_pre and "
            "resid_post."
        )

    def _follow(self, call: _Call) -> list[_Call]:
        """The call, and those that each take what the one before gave."""
        chain = [call]
        for later in self._calls[self._calls.index(call) + 1 :]:
            if chain[-1].feeds(later):
                chain.append(later)
        return chain

    def _source(self, call: _Call) -> _Call:
        """The call to read: an earlier one that gave these very states, where its module serves more than once."""
        if sum(other.module is call.module for other in self._calls) == 1:
            return call
        same = (other for other in self._calls if other.gave.data_ptr() == call.gave.data_ptr())
        return next(other for other in same if other.gave.shape == call.gave.shape)

    def _adds_up(self, attn: _Call, mlp: _Call, scale: float) -> bool:
        missing = self._left - self._entered - scale * (attn.value + mlp.value)
        smaller = scale * min(attn.value.norm(), mlp.value.norm())
        rounding = torch.finfo(attn.gave.dtype).eps * (self._left.norm() + self._entered.norm())
        return bool(missing.norm() <= _TOLERANCE * smaller + rounding)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = (args[0] if args else kwargs["hidden_states"]).float().clone()

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._left = states_of(output).float().clone()

    def _call(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            took = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            gave = output[0] if isinstance(output, tuple) else output
            if took is not None and isinstance(gave, torch.Tensor) and gave.shape == self._entered.shape:
                value = gave.float().clone()
                self._calls.append(_Call(name=name, module=module, took=took, gave=gave, value=value))

        return hook


def _is_attention(call: _Call) -> bool:
    return "Attention" in type(call.module).__name__ or call.name in _ATTENTION_NAMES
