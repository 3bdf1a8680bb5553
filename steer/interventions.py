"""Changes along a direction of the residual stream, one formula each.

h is the residual stream after a block (our layer l is the output of block l), v a unit vector, p = <h, v>:

- add: h + a v
- ablate: h - p v
- mean_ablate: h + (m - p) v, with m the mean projection
- cap: h - v min(p - tau, 0), which lifts what lies below tau to it (arXiv 2601.10387, section 5)

The reference project's files have the cap from the other side: what lies above `cap` along -v is removed, cap = -tau.
Projections and changes are computed in float32, whatever the model's precision. Shape suffixes: D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from personaspace.extract.anatomy import dissect
from personaspace.extract.config import Positions
from personaspace.extract.hooks import LayerHook, changed
from personaspace.steer.config import Method
from personaspace.store.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Intervention:
    """A change at one layer, applicable to tensors whose last dimension is the hidden one.

    Raises InputError for a direction that is zero or not finite, and for a value that is missing or too much.
    """

    method: Method
    layer: int
    """0-based: behind this block."""
    vector_D: NDArray[np.float32]
    """The direction, of any length: only where it points matters."""
    value: float = 0.0
    """In the residual stream's unit: how far to `add`, the mean of `mean_ablate`, the threshold of `cap`."""
    positions: Positions = "all"
    _unit: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        length = float(np.linalg.norm(self.vector_D.astype(np.float64)))
        if not np.isfinite(length) or not length:
            raise InputError(f"Intervention at layer {self.layer}: the direction has length {length}; it must point.")
        if not np.isfinite(self.value):
            raise InputError(f"Intervention at layer {self.layer}: {self.method} by {self.value}; give a number.")

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """The changed states, in the type of ``h``."""
        unit_D = self._unit_on(h.device)
        if self.method == "add":
            return h + (self.value * unit_D).to(h.dtype)
        projection = (h.float() @ unit_D)[..., None]
        match self.method:
            case "ablate":
                change = -projection
            case "mean_ablate":
                change = self.value - projection
            case "cap":
                change = (self.value - projection).clamp(min=0)
        return h + (change * unit_D).to(h.dtype)

    @property
    def changes_nothing(self) -> bool:
        """It need not run at all."""
        return self.method == "add" and self.value == 0

    def _unit_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._unit:
            vector_D = torch.from_numpy(self.vector_D.astype(np.float64))
            self._unit[device] = (vector_D / vector_D.norm()).float().to(device)
        return self._unit[device]


def layer_hooks(interventions: Sequence[Intervention]) -> tuple[LayerHook, ...]:
    """As engines and stages take them. What changes nothing is left out, so that it costs nothing."""
    return tuple(
        LayerHook(layer=intervention.layer, change=intervention, positions=intervention.positions)
        for intervention in interventions
        if not intervention.changes_nothing
    )


def check_hidden(interventions: Sequence[Intervention], hidden: int) -> None:
    """Raise InputError for directions of another size than the model's residual stream."""
    for intervention in interventions:
        found = len(intervention.vector_D)
        if found != hidden:
            raise InputError(f"steer.source: its directions have {found} dimensions, and the model {hidden}.")


@contextmanager
def steered(model: PreTrainedModel, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Within it a transformers model, with its head or without, runs and generates changed.

    Raises InputError for layers that it does not have, UnsupportedModelError for models that are no decoders.
    """
    layers = int(model.config.get_text_config().num_hidden_layers)
    parts = dissect(model, layers)
    for intervention in interventions:
        if not 0 <= intervention.layer < layers:
            raise InputError(f"Intervention at layer {intervention.layer}; the model has the layers 0 to {layers - 1}.")
    check_hidden(interventions, int(model.config.get_text_config().hidden_size))
    with changed(parts.decoder, parts.blocks, layer_hooks(interventions)):
        yield
