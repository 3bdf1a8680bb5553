"""Changes to the residual stream on its way: what steering and capping plug into every engine.

Shape suffixes: B batch, T tokens, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from personaspace.extract.anatomy import states_of
from personaspace.extract.config import Positions
from personaspace.store.errors import InputError

Response = Callable[[], "torch.Tensor | bool"]
"""Which tokens of the present forward pass belong to a response: a mask ``(B, T)``, or one answer for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerHook:
    """A change to the residual stream, made right after a block and seen by everything that follows."""

    layer: int
    change: Callable[[torch.Tensor], torch.Tensor]
    """``h_BTD`` to ``h_BTD``. What it raises ends the forward pass; it is never swallowed."""
    positions: Positions = "all"


def attach(blocks: Mapping[int, nn.Module], hooks: Sequence[LayerHook], response: Response) -> list[RemovableHandle]:
    """Put the hooks of these blocks to work, before all that reads what the blocks give; `remove` ends it.

    Hooks of one layer follow each other in the given order.
    """
    # Each is put before those that are there already, so the last comes first.
    return [
        blocks[hook.layer].register_forward_hook(_changing(hook, response), prepend=True)
        for hook in reversed(hooks)
        if hook.layer in blocks
    ]


@contextmanager
def changed(decoder: nn.Module, blocks: nn.ModuleList, hooks: Sequence[LayerHook]) -> Iterator[None]:
    """Within it a model generates, or runs, with the hooks at work."""
    passes = _CachedPasses()
    handles = attach(dict(enumerate(blocks)), hooks, passes.response)
    if hooks:
        handles.append(decoder.register_forward_pre_hook(passes.begin, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _CachedPasses:
    """Tells prompt from response while a model generates: what is read into an empty cache is the prompt."""

    def __init__(self) -> None:
        self._cached: bool | None = None

    def begin(self, _: nn.Module, __: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """A forward pass of the decoder begins."""
        cache = arguments.get("past_key_values")
        self._cached = None if cache is None else cache.get_seq_length() > 0

    def response(self) -> bool:
        """Of all tokens of the present pass. Raises InputError for a pass without a cache, where nothing tells."""
        if self._cached is None:
            raise InputError(
                "positions: response, in a forward pass without a cache, where nothing tells prompt from response. "
                "Generate with use_cache, or use positions: all."
            )
        return self._cached


def _changing(hook: LayerHook, response: Response) -> Callable[..., Any]:
    def change(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor | tuple[Any, ...]) -> Any:
        states_BTD = states_of(output)
        chosen = True if hook.positions == "all" else response()
        if chosen is False:
            return None
        changed_BTD = hook.change(states_BTD)
        if isinstance(chosen, torch.Tensor):
            changed_BTD = torch.where(chosen[..., None], changed_BTD, states_BTD)
        return changed_BTD if isinstance(output, torch.Tensor) else (changed_BTD, *output[1:])

    return change
