"""What a simulated extraction is made of: the job, the machines, and what each thing costs. Pure arithmetic."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

from personaspace.cluster.schedule import UNCOMMITTED_WINDOWS
from personaspace.extract.packing import batch_by_length, windows
from personaspace.store.layout import Layout

FLOAT32 = 4
"""Bytes of a pooled value."""
STATE_BYTES = 2
"""Bytes of a value of the hidden states, bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model and how its activations are stored; default: Llama 3.3 70B in bfloat16."""

    layers: int = 80
    hidden: int = 8192
    block_parameters: float = 68.45e9
    """Parameters that a token meets: those of the blocks. No lm_head is run, and an embedding is looked up."""
    checkpoint_bytes: float = 141e9
    layer_group: int = 10
    """Layers per shard."""
    unit_rows: int = 120
    """Rollouts per unit."""
    stored_bytes: float = 2.88
    """Per value, at 16 bits of precision (docs/benchmarks.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """The cluster; default: nodes of 8 H100, which all fail now and then."""

    gpus: int
    gpus_per_node: int = 8
    peak: float = 989e12
    """Dense bfloat16 FLOP/s of a GPU."""
    share: float = 0.45
    """Of the peak that a forward pass reaches."""
    handover: float = 4e9
    """Bytes/s at which a stage hands its states to the next one, and does nothing else."""
    encode: float = 300e6
    """Bytes/s of float32 that a stage's writer encodes (docs/benchmarks.md)."""
    publish: float = 0.02
    """Seconds for each shard and its record beside its bytes."""
    read: float = 20e9
    """Bytes/s of the storage that holds the checkpoint, all readers together."""
    write: float = 10e9
    """Bytes/s of the storage that holds the run, all writers together."""
    node_link: float = 3e9
    """Bytes/s of storage that one node reaches."""
    on_nodes: bool = False
    """The checkpoint lies on every node's own disk already; else a node reads it once, whole, from the storage."""
    start: float = 60.0
    """Seconds from a node that has the checkpoint to a replica that is ready: processes, imports, weights to the GPU,
    self-check. A replica that is started anew needs as long."""
    slow: float = 0.0
    """Share of the replicas that take 1.5 times as long for everything. If any do, one more takes 3 times as long."""
    mtbf_hours: float | None = None
    """Of a node, mean time between failures. Default: none fail."""
    away: float = 300.0
    """Seconds until a failed node, or another in its place, is back, without the checkpoint."""
    noticed: float = 10.0
    """Seconds until the driver knows that a node has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverCosts:
    """Seconds of the driver; default: as `benchmarks/cluster.py` measures them, with a run on the driver's own disk
    (docs/scale.md). Python runs one of its threads at a time, but threads wait for storage together."""

    look: float = 6.4e-5
    """One look for answers."""
    look_reference: float = 3.5e-7
    """The same, for each reference that is looked at."""
    answer: float = 1.4e-4
    """To take an answer, ask the schedule and report."""
    submit: float = 1.5e-4
    """To send one stage a micro-batch, tokens included."""
    load: float = 6.7e-5
    """In a thread: to read a window and form its micro-batches, for each rollout."""
    load_wait: float = 0.0
    """The same, for each unit: to wait for its requests to a remote store, one after another."""
    commit: float = 1.2e-5
    """To have a window committed, for each rollout."""
    coordinates: float = 5.9e-3
    """In a thread: to commit the coordinates of a unit."""
    coordinates_wait: float = 6e-3
    """The same: to wait for its requests."""
    start: float = 1.2e-3
    """To ask for a replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One simulated extraction."""

    name: str
    machines: Machines
    shape: Shape = field(default_factory=Shape)
    costs: DriverCosts = field(default_factory=DriverCosts)
    rollouts: int = 331_200
    stages: int = 2
    window_rows: int = 2048
    micro_batch_tokens: int = 8192
    in_flight: int | None = None
    """Micro-batches of a replica at once; default: twice the stages."""
    uncommitted: int = UNCOMMITTED_WINDOWS
    """Windows of a replica that may wait for their writers."""
    seed: int = 0
    """Decides which replicas are slow, and when nodes fail."""
    length_seed: int = 0
    """Decides the rollouts' lengths."""

    @property
    def replicas_per_node(self) -> int:
        return self.machines.gpus_per_node // self.stages

    @property
    def nodes(self) -> int:
        return self.machines.gpus // self.machines.gpus_per_node

    @property
    def replicas(self) -> int:
        return self.nodes * self.replicas_per_node

    @property
    def units(self) -> int:
        return -(-self.rollouts // self.shape.unit_rows)

    @property
    def stage_layers(self) -> list[int]:
        """Layers of each stage."""
        shape = self.shape
        layout = Layout(
            segments=(self.rollouts,),
            layers=shape.layers,
            hidden=shape.hidden,
            unit_rows=shape.unit_rows,
            layer_group=shape.layer_group,
        )
        return [stop - first for first, stop in pairwise(layout.stage_boundaries(self.stages))]

    @property
    def token_seconds(self) -> float:
        """Of one GPU at the stated share of its peak, for one token through all blocks."""
        return 2 * self.shape.block_parameters / (self.machines.peak * self.machines.share)

    def window_batches(self) -> tuple[tuple["Batch", ...], ...]:
        """The micro-batches of each window."""
        return form(self.rollouts, self.shape.unit_rows, self.window_rows, self.micro_batch_tokens, self.length_seed)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, as far as its cost goes."""

    rollouts: int
    tokens: int
    padded: int
    """Tokens that are run."""


def draw_lengths(rollouts: int, seed: int) -> Iterator[tuple[int, int]]:
    """Prompt and response tokens of each rollout.

    Prompts are normal, 100 +- 25 and at least 40; responses lognormal with median 350 and sigma 0.5, cut at 512 tokens
    (22% of them).
    """
    draw = random.Random(seed)
    for _ in range(rollouts):
        yield max(40, round(draw.gauss(100, 25))), min(512, max(1, round(draw.lognormvariate(5.858, 0.5))))


@cache
def form(rollouts: int, unit_rows: int, window_rows: int, budget: int, seed: int) -> tuple[tuple[Batch, ...], ...]:
    """The micro-batches of each window, by the same functions that form them in a run."""
    lengths = [sum(both) for both in draw_lengths(rollouts, seed)]
    units = range(-(-rollouts // unit_rows))
    formed = []
    for window in windows(units, unit_rows, window_rows):
        rows = range(window[0] * unit_rows, min((window[-1] + 1) * unit_rows, rollouts))
        batches = batch_by_length({row: lengths[row] for row in rows}, budget)
        formed.append(
            tuple(
                Batch(len(batch), sum(lengths[row] for row in batch), len(batch) * max(lengths[row] for row in batch))
                for batch in batches
            )
        )
    return tuple(formed)
