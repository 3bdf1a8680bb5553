"""The machines of a simulation: replicas that work, nodes that fail, storage that is shared."""

import random
from collections import deque
from dataclasses import dataclass, field

from personaspace.cluster.schedule import Commit, Task
from personaspace.cluster.simulation.clock import Clock, Link
from personaspace.cluster.simulation.scenario import FLOAT32, STATE_BYTES, Batch, Scenario
from personaspace.cluster.watching.occupancy import Interval


@dataclass(slots=True, eq=False)
class SimulatedReplica:
    """One of them, from its start to its end."""

    number: int
    place: int
    """In the cluster: the GPUs it has."""
    factor: float
    """How many times as long it takes for everything."""
    passes: list[list[Interval]]
    """Forward passes of each stage."""
    free: list[float]
    """When each stage has handed over its last micro-batch."""
    writers: list[deque[tuple[int, int]]]
    """Windows, and their units, that wait for each stage's writer or are at it."""
    unwritten: dict[int, int] = field(default_factory=dict)
    """Window -> stages that have not committed it."""
    joined: float | None = None
    ended: float | None = None


@dataclass(slots=True, eq=False)
class _Node:
    has_checkpoint: bool
    back: float = 0.0
    """When it is there again."""
    failures: int = 0
    replicas: list[SimulatedReplica] = field(default_factory=list)
    reading: list[SimulatedReplica] = field(default_factory=list)
    """Those that wait for the checkpoint."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the driver gets to hear of a replica."""

    replica: SimulatedReplica
    action: Task | Commit | None = None
    """What is done; None: it is loaded."""
    lost: bool = False


class World:
    """Everything but the driver."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario, machines = scenario, scenario.machines
        self.clock = Clock()
        self._reading = Link(self.clock, machines.read, machines.node_link)
        # A node's writers have an even share of its link each, whoever else writes.
        self._writing = Link(self.clock, machines.write, machines.node_link / machines.gpus_per_node)
        self._draw = random.Random(scenario.seed)
        self.answers: deque[Answer] = deque()
        self.replicas: list[SimulatedReplica] = []
        self._nodes = [_Node(has_checkpoint=machines.on_nodes) for _ in range(scenario.nodes)]
        self._factors = self._draw_factors()
        layers = scenario.stage_layers
        self._token_seconds = [scenario.token_seconds * own / sum(layers) for own in layers]
        for node in self._nodes:
            self._await_failure(node, 0.0)

    def _draw_factors(self) -> list[float]:
        replicas, slow = self._scenario.replicas, self._scenario.machines.slow
        factors = [1.0] * replicas
        for place in self._draw.sample(range(replicas), round(slow * replicas)):
            factors[place] = 1.5
        if slow:
            factors[self._draw.randrange(replicas)] = 3.0
        return factors

    def start(self, place: int, now: float) -> None:
        """Start a replica; it begins to load once its node is there."""
        stages = self._scenario.stages
        replica = SimulatedReplica(
            number=len(self.replicas),
            place=place,
            factor=self._factors[place],
            passes=[[] for _ in range(stages)],
            free=[0.0] * stages,
            writers=[deque() for _ in range(stages)],
        )
        self.replicas.append(replica)
        node = self._node(replica)
        self.clock.at(max(now, node.back), lambda time: self._place(replica, time))

    def _node(self, replica: SimulatedReplica) -> _Node:
        return self._nodes[replica.place // self._scenario.replicas_per_node]

    def _place(self, replica: SimulatedReplica, now: float) -> None:
        node = self._node(replica)
        if now < node.back:
            self.clock.at(node.back, lambda time: self._place(replica, time))
            return
        node.replicas.append(replica)
        if node.has_checkpoint:
            self._load(replica, now)
            return
        node.reading.append(replica)
        if len(node.reading) == 1:
            failures = node.failures
            size = self._scenario.shape.checkpoint_bytes
            self._reading.send(now, size, lambda end: self._read(node, end) if node.failures == failures else None)

    def _read(self, node: _Node, now: float) -> None:
        node.has_checkpoint = True
        for replica in node.reading:
            self._load(replica, now)
        node.reading.clear()

    def _load(self, replica: SimulatedReplica, now: float) -> None:
        self.clock.at(now + self._scenario.machines.start * replica.factor, lambda _: self._answer(replica, None))

    def _answer(self, replica: SimulatedReplica, action: Task | Commit | None) -> None:
        if replica.ended is None:
            self.answers.append(Answer(replica, action))

    def _await_failure(self, node: _Node, now: float) -> None:
        hours = self._scenario.machines.mtbf_hours
        if hours is not None:
            self.clock.at(now + self._draw.expovariate(1 / (3600 * hours)), lambda time: self._fail(node, time))

    def _fail(self, node: _Node, now: float) -> None:
        """The node dies, with all its replicas, and comes back later without the checkpoint, if it had to read it."""
        machines = self._scenario.machines
        node.back = now + machines.away
        node.failures += 1
        node.has_checkpoint = machines.on_nodes
        for replica in node.replicas:
            replica.ended = now
            for passes in replica.passes:
                passes[:] = [(start, min(stop, now)) for start, stop in passes if start < now]
        lost, node.replicas, node.reading = node.replicas, [], []
        self.clock.at(
            now + machines.noticed,
            lambda _: self.answers.extend(Answer(replica, lost=True) for replica in lost),
        )
        self._await_failure(node, node.back)

    def forward(self, replica: SimulatedReplica, task: Task, batch: Batch, now: float) -> None:
        """The micro-batch passes through the stages, each of which takes micro-batches as they were sent."""
        self.clock.run(now)
        if replica.ended is not None:
            return
        machines, last = self._scenario.machines, self._scenario.stages - 1
        handover = batch.padded * self._scenario.shape.hidden * STATE_BYTES / machines.handover * replica.factor
        arrives = now
        for stage, token_seconds in enumerate(self._token_seconds):
            start = max(replica.free[stage], arrives)
            stop = start + batch.padded * token_seconds * replica.factor
            replica.passes[stage].append((start, stop))
            replica.free[stage] = arrives = stop + (handover if stage < last else 0.0)
        self.clock.at(arrives, lambda _: self._answer(replica, task))

    def commit(self, replica: SimulatedReplica, commit: Commit, units: int, now: float) -> None:
        """Every stage's writer encodes and stores its shards of the window, one window after the other."""
        self.clock.run(now)
        if replica.ended is not None:
            return
        replica.unwritten[commit.window] = self._scenario.stages
        for stage, waiting in enumerate(replica.writers):
            waiting.append((commit.window, units))
            if len(waiting) == 1:
                self._write(replica, stage, now)

    def _write(self, replica: SimulatedReplica, stage: int, now: float) -> None:
        shape, machines = self._scenario.shape, self._scenario.machines
        _, units = replica.writers[stage][0]
        layers = self._scenario.stage_layers[stage]
        values = units * shape.unit_rows * layers * shape.hidden
        shards = units * layers / shape.layer_group
        encoded = now + (values * FLOAT32 / machines.encode + shards * machines.publish) * replica.factor

        def send(time: float) -> None:
            self._writing.send(time, values * shape.stored_bytes, lambda end: self._written(replica, stage, end))

        self.clock.at(encoded, lambda time: send(time) if replica.ended is None else None)

    def _written(self, replica: SimulatedReplica, stage: int, now: float) -> None:
        if replica.ended is not None:
            return
        window, _ = replica.writers[stage].popleft()
        replica.unwritten[window] -= 1
        if not replica.unwritten[window]:
            del replica.unwritten[window]
            self._answer(replica, Commit(window=window))
        if replica.writers[stage]:
            self._write(replica, stage, now)
