"""A discrete-event simulation of the extract step: the real schedule, with simulated machines and driver.

The driver does what supervisor.py and extraction.py do, in that order: its loop looks for answers, tells the schedule,
and sends what is due; its threads read windows ahead and commit coordinates. Each of these costs measured seconds
(scenario.DriverCosts) of Python's interpreter, of which threads that want it have even shares. Same scenario, same
outcome.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from personaspace.cluster.schedule import Commit, Schedule, Task
from personaspace.cluster.simulation.process import Errand, Process
from personaspace.cluster.simulation.scenario import Scenario
from personaspace.cluster.simulation.simulated import Answer, SimulatedReplica, World
from personaspace.cluster.watching.occupancy import occupancy

THREADS = 32
AHEAD = 2
"""Threads that read windows and commit coordinates, and windows that are read ahead, as extraction.py has them (tested
to be so)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Where the GPUs' time goes, from the first replica's request to the last commit; adds up to 1."""

    useful: float
    """Real tokens, each once, at full speed. What is left of 1 is lost; this is the efficiency."""
    padding: float
    repeated: float
    """Forward passes whose results were lost."""
    slowness: float
    """Slow replicas' additional time."""
    absent: float
    """Before a replica is ready, and while a failed node is away."""
    feeding: float
    """From a replica's start to its first forward pass: it waits for the driver."""
    bubble: float
    """Between a stage's first and last forward pass."""
    tail: float
    """After a stage's last forward pass, or all along if there was no window for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a scenario."""

    seconds: float
    """From the first request for a replica until everything is committed."""
    ideal: float
    """Seconds of forward passes, had all GPUs nothing else to do and no padding."""
    ready: float
    """Seconds until a replica is first ready; mean over the replicas."""
    shares: Shares
    bubble: float
    """Of a stage between its first and last forward pass (occupancy.py); mean over the replicas that got work."""
    driver_busy: float
    """Share of the driver's thread, from the first replica's start to the end."""
    driver: dict[str, float]
    """Seconds of the driver by what it did."""
    calls_per_s: float
    """Micro-batches and commits that were sent and answered, from the first replica's start to the end."""
    windows: int
    micro_batches: int
    padding: float
    """Share of the tokens run that are padding."""
    lost_replicas: int
    repeated: int
    """Rollouts that had come through, and ran again."""
    waiting_for: float
    """Seconds from the moment when no window waits until the end."""
    commits: tuple[int, ...]
    """Windows, in the order in which they were committed."""

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds

    @property
    def working_efficiency(self) -> float:
        """The same without the time until replicas are first ready."""
        return self.ideal / (self.seconds - self.ready)


def simulate(scenario: Scenario) -> Outcome:
    """Run the scenario to its end."""
    return _Driver(scenario).run()


class _Driver:
    """supervisor.Supervisor and extraction.Extraction, as far as they take time."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario, self._costs = scenario, scenario.costs
        self._windows = scenario.window_batches()
        self._world = World(scenario)
        self._schedule = Schedule(
            range(len(self._windows)),
            self._open_window,
            in_flight=scenario.in_flight or 2 * scenario.stages,
            uncommitted=scenario.uncommitted,
            attempts=2,
        )
        self._free = deque(range(scenario.replicas))
        """Places in the cluster for replicas."""
        self._process = Process(self._world.clock, THREADS)
        self._read = 0
        """Windows that have been read, or are being read: the first so many."""
        self._ready: set[int] = set()
        """Those that have been."""
        self._references: Counter[int] = Counter()
        """Replica -> references that it has not answered."""
        self._active: dict[int, SimulatedReplica] = {}
        self._calls = self._lost = self._repeated = 0
        self._begun = self._spent = self._emptied = 0.0
        self._commits: list[int] = []

    def run(self) -> Outcome:
        self._fill()
        while not self._schedule.done:
            self._process.wait(lambda: bool(self._world.answers))
            self._process.spend("look", self._costs.look + self._costs.look_reference * self._references.total())
            answers = list(self._world.answers)
            self._world.answers.clear()
            for answer in answers:
                self._handle(answer)
        self._process.wait(lambda: not self._process.outstanding)
        return self._outcome()

    def _fill(self) -> None:
        """As many replicas as there is room for, but no more than there are windows for."""
        loading = len(self._world.replicas) - self._lost - len(self._active)
        for _ in range(min(len(self._free), self._schedule.waiting - loading)):
            self._process.spend("start", self._costs.start)
            self._world.start(self._free.popleft(), self._process.now)

    def _handle(self, answer: Answer) -> None:
        replica, action = answer.replica, answer.action
        if answer.lost:
            self._lose(replica)
            return
        if action is not None and replica.number not in self._active:
            return  # It was lost a moment ago.
        match action:
            case None:
                if not self._active and not self._begun:
                    self._begun, self._spent = self._process.now, sum(self._process.seconds.values())
                replica.joined = self._process.now
                self._active[replica.number] = replica
                self._schedule.join(replica.number)
            case Task():
                self._process.spend("answer", self._costs.answer)
                self._references[replica.number] -= 1
                self._schedule.finish(replica.number, action)
            case Commit(window=window):
                self._process.spend("answer", self._costs.answer * self._scenario.stages)
                self._references[replica.number] -= self._scenario.stages
                self._schedule.committed(replica.number, window)
                self._commits.append(window)
                for _ in range(self._units(window)):
                    self._process.send(Errand("coordinates", self._costs.coordinates_wait, self._costs.coordinates))
        self._feed(replica)

    def _feed(self, replica: SimulatedReplica) -> None:
        for action in self._schedule.due(replica.number):
            self._calls += 1
            if isinstance(action, Task):
                self._process.spend("submit", self._costs.submit * self._scenario.stages)
                self._references[replica.number] += 1
                self._world.forward(replica, action, self._windows[action.window][action.batch], self._process.now)
            else:
                self._process.spend("commit", self._costs.commit * self._rollouts(action.window))
                self._references[replica.number] += self._scenario.stages
                self._world.commit(replica, action, self._units(action.window), self._process.now)

    def _lose(self, replica: SimulatedReplica) -> None:
        self._lost += 1
        self._references.pop(replica.number, None)
        if self._active.pop(replica.number, None) is not None:
            # A node that died blames no micro-batch.
            self._repeated += self._schedule.leave(replica.number, blame=[]).rollouts
            for other in self._active.values():
                self._feed(other)
        self._free.append(replica.place)
        self._fill()

    def _open_window(self, window: int) -> Sequence[int]:
        while self._read < min(window + 1 + AHEAD, len(self._windows)):
            number = self._read
            seconds, wait = self._costs.load * self._rollouts(number), self._costs.load_wait * self._units(number)
            self._process.send(Errand("load", wait, seconds, partial(self._ready.add, number)))
            self._read += 1
        self._process.wait(lambda: window in self._ready)
        if not self._schedule.waiting:
            self._emptied = self._process.now
        return [batch.rollouts for batch in self._windows[window]]

    def _rollouts(self, window: int) -> int:
        return sum(batch.rollouts for batch in self._windows[window])

    def _units(self, window: int) -> int:
        return -(-self._rollouts(window) // self._scenario.shape.unit_rows)

    def _outcome(self) -> Outcome:
        end, scenario = self._process.now, self._scenario
        batches = [batch for window in self._windows for batch in window]
        tokens, padded = sum(batch.tokens for batch in batches), sum(batch.padded for batch in batches)
        ideal = tokens * scenario.token_seconds / (scenario.replicas * scenario.stages)
        whole = scenario.replicas * scenario.stages * end
        useful = tokens * scenario.token_seconds / whole
        busy = nominal = feeding = bubble = 0.0
        unused = scenario.replicas - len({replica.place for replica in self._world.replicas})
        present = unused * scenario.stages * end
        for replica in self._world.replicas:
            if replica.joined is None:
                continue
            last = min(end, replica.ended or end)
            joined = min(replica.joined, last)
            present += (last - joined) * scenario.stages
            for passes in replica.passes:
                if passes:
                    worked = sum(stop - start for start, stop in passes)
                    busy += worked
                    nominal += worked / replica.factor
                    feeding += passes[0][0] - joined
                    bubble += passes[-1][1] - passes[0][0] - worked
        padding = (padded - tokens) * scenario.token_seconds / whole
        working = [replica for replica in self._world.replicas if all(replica.passes)]
        first: dict[int, float] = {}
        for replica in self._world.replicas:
            if replica.joined is not None:
                first.setdefault(replica.place, replica.joined)
        return Outcome(
            seconds=end,
            ideal=ideal,
            ready=fmean(first.values()),
            shares=Shares(
                useful=useful,
                padding=padding,
                repeated=nominal / whole - useful - padding,
                slowness=(busy - nominal) / whole,
                absent=1 - present / whole,
                feeding=feeding / whole,
                bubble=bubble / whole,
                tail=(present - feeding - bubble - busy) / whole,
            ),
            bubble=fmean(occupancy(replica.passes).bubble for replica in working),
            driver_busy=(sum(self._process.seconds.values()) - self._spent) / (end - self._begun),
            driver=dict(self._process.seconds),
            calls_per_s=self._calls / (end - self._begun),
            windows=len(self._windows),
            micro_batches=len(batches),
            padding=1 - tokens / padded,
            lost_replicas=self._lost,
            repeated=self._repeated,
            waiting_for=end - self._emptied,
            commits=tuple(self._commits),
        )
