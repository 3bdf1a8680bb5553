"""Ray actors that extract: each holds a slice of the layers, pools them, and writes its own layer groups."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from personaspace.cluster.events import Busy, Loaded
from personaspace.cluster.faults import explain
from personaspace.cluster.replicas import loaded
from personaspace.cluster.sharding import Member, Share
from personaspace.cluster.shards import ShardWriter, UnitShards
from personaspace.cluster.tensor import load_tensor_parallel
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.collect import WindowBuffer
from personaspace.extract.config import Attention, Dtype
from personaspace.extract.hooks import LayerHook
from personaspace.extract.offload import load_offloaded
from personaspace.extract.packing import MicroBatch
from personaspace.extract.reductions import Readout
from personaspace.extract.selfcheck import check_stage
from personaspace.extract.slicing import load_slice
from personaspace.extract.stage import Stage
from personaspace.store.config import Precision
from personaspace.store.layout import Layout
from personaspace.store.lease import Fence
from personaspace.store.schema import ArraySpec


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What a stage actor is made from."""

    checkpoint: Checkpoint
    dtype: Dtype
    attention: Attention
    share: Share
    layers: tuple[int, ...]
    """Layers that are read."""
    arrays: tuple[ArraySpec, ...]
    """Arrays that are read."""
    packed: bool
    compiled: bool
    layout: Layout
    spans_per_rollout: int
    precision: Precision
    fence: Fence
    device: str
    threads: int
    hooks: tuple[LayerHook, ...]
    """Changes to the residual stream, of all layers."""
    direct: bool
    """Hidden states go from device to device, not through the object store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """How a micro-batch has fared on its way through the stages."""

    parts: int = 1
    """The most parts in which a stage ran it: more than one where memory ran out."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """Row -> reason, for rollouts that a stage could not run; what later stages got of them means nothing."""
    busy: tuple[Busy, ...] = ()
    """When each stage worked on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """What one stage hands to the next."""

    states: NDArray[Any] | torch.Tensor
    """Hidden states, as `to_wire` makes them; a tensor on the device where they go directly."""
    ran: Ran


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A micro-batch to run, and what to do with it."""

    window: int
    batch: MicroBatch
    rollout_ids: tuple[str, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Place in the micro-batch -> why a dummy is run instead."""
    trial: bool = False
    """Nothing is kept of it."""


@ray.remote(concurrency_groups={"store": 1}, enable_tensor_transport=True)
class StageActor(Member):
    """One stage of one replica, or one rank of it, or all of it.

    `forward` and `commit` run in threads of their own: compute never waits for disk.
    """

    def __init__(self, spec: StageSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._readout = Readout.of_arrays(spec.arrays)
        self._writer = ShardWriter(
            fence=spec.fence,
            layout=spec.layout,
            arrays=spec.arrays,
            layers=spec.layers,
            spans_per_rollout=spec.spans_per_rollout,
            precision=spec.precision,
        )
        self._windows: dict[int, WindowBuffer] = {}

    def load(self, meeting: str = "") -> Loaded:
        """Load its share of the model, and check that it can be read. ``meeting``: of a gang.

        Raises UnsupportedModelError.
        """
        spec, share, begin = self._spec, self._spec.share, time.monotonic()
        gang = None
        if share.sharding == "tensor":
            gang = self.join(meeting, rank=share.place, ranks=share.actors, device=spec.device)
            model = load_tensor_parallel(
                spec.checkpoint, gang, dtype=spec.dtype, attention=spec.attention, stop=share.stop
            )
        elif share.offload is not None:
            model = load_offloaded(
                spec.checkpoint,
                share.offload,
                dtype=spec.dtype,
                device=spec.device,
                attention=spec.attention,
                stop=share.stop,
            )
        else:
            model = load_slice(
                spec.checkpoint,
                first=share.first,
                stop=share.stop,
                dtype=spec.dtype,
                device=spec.device,
                attention=spec.attention,
                compiled=spec.compiled,
            )
        self._stage = Stage(
            model,
            last=share.last,
            sites=self._readout.sites,
            layers=spec.layers,
            hooks=spec.hooks,
            before_halves=gang.run_out_of_memory if gang is not None else lambda: None,
        )
        check_stage(self._stage, packed=spec.packed)
        return loaded(begin)

    def forward(self, order: Order, received: Passed | None) -> Passed | Ran:
        """Run one micro-batch, and keep what it gives until its window is committed.

        ``received`` is what the stage before gave; the last one gives how the micro-batch has fared.
        """
        with explain(self._spec.share.name, order.rollout_ids):
            begin, batch = time.time(), order.batch
            before = Ran() if received is None else received.ran
            states_BTD = None if received is None else from_wire(received.states, self._spec.dtype)
            output = self._stage.forward(batch.blank(order.left_out) if order.left_out else batch, states_BTD)
            failed = {batch.rows[place]: why for place, why in order.left_out.items()}
            if not order.trial:
                buffer = self._windows.setdefault(order.window, WindowBuffer())
                buffer.add(batch, output, split=before.parts > 1, failed={**before.failed, **failed})
            hidden_BTD = output.hidden_BTD
            states = None if hidden_BTD is None else hidden_BTD if self._spec.direct else to_wire(hidden_BTD)
            if self._spec.device == "cuda":
                # What fails on the device fails here, where its rollouts are known; the next one is waiting already.
                torch.cuda.synchronize()
            ran = Ran(
                parts=max(before.parts, output.parts),
                failed={**output.failed, **before.failed},
                busy=(*before.busy, Busy(activity="forward", start=begin, stop=time.time())),
            )
            return ran if states is None else Passed(states=states, ran=ran)

    @ray.method(concurrency_group="store")
    def commit(self, window: int, units: Sequence[UnitShards]) -> Busy:
        """Check, encode, publish and record the window's shards, then forget the window."""
        begin = time.time()
        buffer = self._windows.pop(window, WindowBuffer())
        for unit in units:
            if unit.shards:
                self._writer.commit(unit, buffer.means(unit.expected), split=buffer.split)
        return Busy(activity="commit", start=begin, stop=time.time())


def to_wire(h_BTD: torch.Tensor) -> NDArray[Any]:
    """Hidden states as a NumPy array, which Ray hands over without copying; bfloat16 travels as its bits."""
    h_BTD = h_BTD.cpu().contiguous()
    return h_BTD.view(torch.int16).numpy() if h_BTD.dtype == torch.bfloat16 else h_BTD.numpy()


def from_wire(states: NDArray[Any] | torch.Tensor, dtype: Dtype) -> torch.Tensor:
    """Hidden states from `to_wire`. The array is read-only shared memory: the model must not write into it."""
    if isinstance(states, torch.Tensor):
        return states
    writable = np.array(states)
    tensor = torch.from_numpy(writable)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
