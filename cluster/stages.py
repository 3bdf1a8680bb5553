"""Ray actors that extract: each holds a slice of the layers, pools them, and writes its own layer groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from personaspace.cluster.faults import explain
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.collect import WindowBuffer, inspect_unit
from personaspace.extract.config import Dtype
from personaspace.extract.packing import MicroBatch
from personaspace.extract.stage import Stage
from personaspace.store.commit import commit
from personaspace.store.config import Precision
from personaspace.store.layout import Layout, shard_key
from personaspace.store.lease import Fence
from personaspace.store.schema import RESID_POST_MEAN, decode_shard, encode_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What a stage actor is made from."""

    checkpoint: Checkpoint
    dtype: Dtype
    first: int
    stop: int
    layout: Layout
    precision: Precision
    fence: Fence
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitShards:
    """Shards of one unit that a stage has to commit."""

    unit: int
    groups: tuple[int, ...]
    """Layer groups of this stage without a record."""
    dropped: Mapping[int, str]
    """Rows that were dropped before extraction, with reasons."""
    source: str
    """SHA-256 of the rollouts that were run."""
    redo: Mapping[int, int]
    """Group -> generation of the record to write, where it is not 0: in a repair."""


@ray.remote(concurrency_groups={"store": 1})
class StageActor:
    """One stage of one replica. `forward` and `commit` run in threads of their own: compute never waits for disk."""

    def __init__(self, spec: StageSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._name = f"stage of layers {spec.first} to {spec.stop - 1}"
        self._stage = Stage(spec.checkpoint, first=spec.first, stop=spec.stop, dtype=spec.dtype, device=spec.device)
        self._windows: dict[int, WindowBuffer] = {}

    @ray.method(num_returns=2)
    def forward(
        self, window: int, batch: MicroBatch, rollout_ids: Sequence[str], received: NDArray[Any] | None
    ) -> tuple[NDArray[Any] | None, int]:
        """Run one micro-batch; keep its span means for ``window``. Returns the next stage's states, and tokens."""
        with explain(self._name, rollout_ids):
            output = self._stage.forward(batch, None if received is None else from_wire(received, self._spec.dtype))
            buffer = self._windows.setdefault(
                window, WindowBuffer(self._spec.stop - self._spec.first, self._spec.layout.hidden)
            )
            buffer.add(batch.rows, output.means_BLD)
            return None if output.hidden_BTD is None else to_wire(output.hidden_BTD), batch.tokens

    @ray.method(concurrency_group="store")
    def commit(self, window: int, units: Sequence[UnitShards]) -> None:
        """Check, encode, publish and record the window's shards, then forget the window."""
        spec = self._spec
        buffer = self._windows.pop(window, WindowBuffer(spec.stop - spec.first, spec.layout.hidden))
        for unit in units:
            planned = spec.layout.unit_row_range(unit.unit)
            for group in unit.groups:
                layers = spec.layout.group_layers(group)
                own = slice(layers.start - spec.first, layers.stop - spec.first)
                values, dropped = buffer.unit_values(spec.layout.unit_slice(unit.unit), unit.dropped, planned, own)
                commit(
                    spec.fence,
                    (RESID_POST_MEAN, unit.unit, group),
                    {shard_key(RESID_POST_MEAN, unit.unit, group): encode_shard(values, spec.layout, spec.precision)},
                    rows=planned,
                    dropped=dropped,
                    source=unit.source,
                    generation=unit.redo.get(group, 0),
                    inspect=partial(inspect_shard, spec.layout, unit.unit, group, unit.dropped),
                )


def inspect_shard(layout: Layout, unit: int, group: int, dropped: Mapping[int, str], data: bytes) -> dict[int, str]:
    """Dropped rows of a shard found without a record. Raises IntegrityError if it is not this unit's, whole."""
    values = decode_shard(data, layout, len(layout.group_layers(group)))
    return inspect_unit(values, layout.unit_slice(unit).start, dropped, layout.unit_row_range(unit))


def to_wire(h_BTD: torch.Tensor) -> NDArray[Any]:
    """Hidden states as a NumPy array, which Ray hands over without copying; bfloat16 travels as its bits."""
    h_BTD = h_BTD.cpu().contiguous()
    return h_BTD.view(torch.int16).numpy() if h_BTD.dtype == torch.bfloat16 else h_BTD.numpy()


def from_wire(states: NDArray[Any], dtype: Dtype) -> torch.Tensor:
    """Hidden states from `to_wire`. The array is read-only shared memory: the model must not write into it."""
    writable = np.array(states)
    tensor = torch.from_numpy(writable)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
