"""The search for rollouts that kill their worker."""

import math
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from personaspace.cluster.quarantine import Quarantine


def try_out(trial: Quarantine, kills: Callable[[frozenset[int]], bool]) -> int:
    """Run the trial to its end; ``kills`` tells from the places that hold their rollouts. Returns the runs."""
    runs = 0
    while not (trial.settled or trial.hopeless):
        runs += 1
        assert runs < 1000
        real = frozenset(range(trial.rollouts)) - trial.blanked
        if kills(real):
            trial.died()
        else:
            trial.passed()
    return runs


@given(rollouts=st.integers(1, 40), data=st.data())
def test_finds_all_culprits_and_nobody_else(rollouts: int, data: st.DataObject) -> None:
    guilty = data.draw(st.frozensets(st.integers(0, rollouts - 1), max_size=4))
    trial = Quarantine(rollouts)
    try_out(trial, lambda real: bool(real & guilty))
    assert trial.settled
    assert trial.culprits == guilty
    # Each costs one death for its search's beginning and at most one a halving; the first one nothing more for BLANK.
    assert trial.deaths <= len(guilty) * (2 + math.ceil(math.log2(rollouts)))


@given(rollouts=st.integers(1, 40))
def test_nobody_is_to_blame_where_dummies_die_as_well(rollouts: int) -> None:
    trial = Quarantine(rollouts)
    try_out(trial, lambda _: True)
    assert trial.hopeless
    assert trial.culprits == set()
    assert trial.deaths == 2


def test_two_that_only_kill_together_are_not_taken_for_one() -> None:
    trial = Quarantine(8)
    try_out(trial, lambda real: {1, 6} <= real)
    assert trial.hopeless
    assert trial.culprits == set()


@given(rollouts=st.integers(1, 40), passes=st.integers(0, 12))
def test_a_coincidence_costs_nobody(rollouts: int, passes: int) -> None:
    """A worker that dies once, for a reason of its own."""
    trial = Quarantine(rollouts)
    countdown = iter(range(passes, -1000, -1))
    try_out(trial, lambda real: next(countdown) == 0 and bool(real))
    assert trial.settled
    assert trial.culprits == set()


def test_results_count_only_when_everybody_else_took_part() -> None:
    trial = Quarantine(4)
    seen = []
    while not trial.settled:
        real = frozenset(range(4)) - trial.blanked
        seen.append((sorted(real), trial.is_trial))
        trial.died() if 2 in real else trial.passed()
    assert seen == [
        ([0, 1, 2, 3], False),
        ([], True),
        ([0, 1], True),
        ([2], True),
        ([0, 1, 3], False),
    ]
