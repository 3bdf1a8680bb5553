"""The simulation of the extract step: what holds for every scenario, and what can be worked out by hand."""

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.cluster import extraction
from personaspace.cluster.simulation import simulate as simulation
from personaspace.cluster.simulation.clock import Clock, Link
from personaspace.cluster.simulation.scenario import FLOAT32, STATE_BYTES, DriverCosts, Machines, Scenario, Shape
from personaspace.cluster.simulation.simulate import simulate

FREE = DriverCosts(
    look=0, look_reference=0, answer=0, submit=0, load=0, commit=0, coordinates=0, coordinates_wait=0, start=0
)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Small ones, with everything that can go wrong."""
    stages = draw(st.sampled_from([1, 2, 4]))
    return Scenario(
        name="drawn",
        machines=Machines(
            gpus=draw(st.sampled_from([4, 8, 12])),
            gpus_per_node=4,
            write=draw(st.sampled_from([1e8, 1e10])),
            on_nodes=draw(st.booleans()),
            start=draw(st.sampled_from([0.0, 20.0])),
            slow=draw(st.sampled_from([0.0, 0.5])),
            mtbf_hours=draw(st.sampled_from([None, 0.05, 0.2])),
            away=draw(st.sampled_from([0.0, 60.0])),
        ),
        # Of a small model, so that a run gets on between two failures.
        shape=Shape(unit_rows=10, block_parameters=8e9, hidden=4096, checkpoint_bytes=16e9),
        costs=draw(st.sampled_from([FREE, DriverCosts(), DriverCosts(coordinates=0.5, load_wait=0.1)])),
        rollouts=draw(st.integers(1, 800)),
        stages=stages,
        window_rows=draw(st.sampled_from([10, 30, 400])),
        micro_batch_tokens=draw(st.sampled_from([1024, 8192])),
        in_flight=draw(st.sampled_from([None, 1])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=150, deadline=None)
@given(scenario=scenarios())
def test_every_window_is_committed_once_and_all_time_is_accounted_for(scenario: Scenario) -> None:
    outcome = simulate(scenario)
    assert sorted(outcome.commits) == list(range(math.ceil(scenario.units / max(1, scenario.window_rows // 10))))
    shares = asdict(outcome.shares)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > -1e-9 for share in shares.values()), shares
    assert outcome.seconds > outcome.ideal
    assert outcome.efficiency == pytest.approx(outcome.shares.useful)
    assert -1e-9 <= outcome.bubble < 1
    assert 0 <= outcome.driver_busy <= 1 + 1e-9
    if scenario.machines.mtbf_hours is None:
        assert (outcome.lost_replicas, outcome.repeated) == (0, 0)
        assert outcome.shares.repeated == pytest.approx(0, abs=1e-9)
    else:
        calm = simulate(replace(scenario, machines=replace(scenario.machines, mtbf_hours=None)))
        work, calm_work = (
            (found.shares.useful + found.shares.padding + found.shares.repeated) * found.seconds
            for found in (outcome, calm)
        )
        assert work >= calm_work * (1 - 1e-9)
    if not scenario.machines.slow:
        assert outcome.shares.slowness == pytest.approx(0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(scenario=scenarios())
def test_the_same_scenario_has_the_same_outcome(scenario: Scenario) -> None:
    assert simulate(scenario) == simulate(scenario)


def one_node(**machines: object) -> Scenario:
    """One replica of two stages, a driver that takes no time, one window of one unit."""
    plain = Machines(gpus=2, gpus_per_node=2, on_nodes=True, start=10)
    return Scenario(name="one", machines=replace(plain, **machines), costs=FREE, rollouts=120, window_rows=120)


def test_one_window_by_hand() -> None:
    """Two equal stages: the second one ends with what it runs of the last micro-batch."""
    scenario = one_node()
    shape, machines = scenario.shape, scenario.machines
    [batches] = scenario.window_batches()
    each = 2 * shape.block_parameters / 2 / (machines.peak * machines.share)
    free, arrives = 0.0, 10.0
    for batch in batches:
        free_first = arrives + batch.padded * each + batch.padded * shape.hidden * STATE_BYTES / machines.handover
        free = max(free, free_first) + batch.padded * each
        arrives = free_first
    values = 120 * 40 * shape.hidden
    encode = values * FLOAT32 / machines.encode + 4 * machines.publish
    write = values * shape.stored_bytes / (machines.node_link / 2)
    assert simulate(scenario).seconds == pytest.approx(free + encode + write)


def test_a_node_reads_the_checkpoint_once_and_all_nodes_share_the_storage() -> None:
    near = simulate(one_node())
    assert simulate(one_node(on_nodes=False)).seconds == pytest.approx(near.seconds + 141e9 / 3e9)
    many = Scenario(name="many", machines=Machines(gpus=128, start=0), costs=FREE, rollouts=64 * 120, window_rows=120)
    assert simulate(many).ready == pytest.approx(16 * 141e9 / 20e9)


def test_more_replicas_than_windows_stand_idle() -> None:
    scenario = Scenario(name="few", machines=Machines(gpus=64, on_nodes=True), rollouts=2 * 2040, window_rows=2040)
    outcome = simulate(scenario)
    assert outcome.windows == 2
    assert outcome.shares.tail > 30 / 32


def test_what_the_driver_does_alone_bounds_the_run() -> None:
    scenario = Scenario(
        name="slow driver",
        machines=Machines(gpus=64, on_nodes=True, start=1),
        costs=replace(FREE, coordinates=10.0),
        rollouts=100 * 120,
        window_rows=120,
    )
    outcome = simulate(scenario)
    assert outcome.seconds > 1000
    assert outcome.driver == {**dict.fromkeys(outcome.driver, 0.0), "coordinates": pytest.approx(1000)}
    assert outcome.driver_busy > 0.95


def test_nodes_that_fail_cost_what_was_not_committed() -> None:
    scenario = Scenario(
        name="failing", machines=Machines(gpus=16, on_nodes=True, mtbf_hours=0.02), rollouts=10_000, window_rows=1200
    )
    outcome = simulate(scenario)
    assert outcome.lost_replicas > 0
    assert outcome.lost_replicas % 4 == 0
    assert 0 < outcome.repeated <= outcome.lost_replicas * 4 * 1200, "of the windows at work and of those uncommitted"


def test_the_simulated_driver_is_made_as_the_real_one() -> None:
    assert (simulation.THREADS, simulation.AHEAD) == (extraction.THREADS, extraction.AHEAD)


@given(
    sizes=st.lists(st.floats(1, 1e6), min_size=1, max_size=20),
    starts=st.lists(st.floats(0, 100), min_size=20, max_size=20),
    total=st.floats(1e2, 1e6),
    each=st.floats(1e2, 1e6),
)
def test_no_transfer_beats_its_share_and_no_bandwidth_is_left_unused(
    sizes: list[float], starts: list[float], total: float, each: float
) -> None:
    clock = Clock()
    link = Link(clock, total, each)
    ends: dict[int, float] = {}
    flows = sorted(zip(starts, sizes, strict=False))
    for number, (start, size) in enumerate(flows):
        clock.run(start)
        link.send(start, size, lambda time, number=number: ends.__setitem__(number, time))  # type: ignore[misc]
    clock.run(math.inf)
    assert len(ends) == len(flows)
    for number, (start, size) in enumerate(flows):
        assert ends[number] >= start + size / min(total, each) * (1 - 1e-6) - 1e-6
    longest = max(ends.values()) - min(starts[: len(sizes)])
    assert longest >= sum(sizes) / total * (1 - 1e-6) - 1e-6
    slowest = min(each, total / len(flows))
    assert all(ends[n] <= start + size / slowest * (1 + 1e-6) + 1e-6 for n, (start, size) in enumerate(flows))
