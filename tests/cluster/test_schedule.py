"""The schedule of all replicas, as a state machine."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from personaspace.cluster.schedule import Commit, Loss, Schedule, Task


def schedule(sizes: Sequence[Sequence[int]], *, in_flight: int = 4, attempts: int = 2) -> Schedule:
    """Windows 0, 1, ..., with so many rollouts in each of their micro-batches."""
    return Schedule(range(len(sizes)), sizes.__getitem__, in_flight=in_flight, uncommitted=2, attempts=attempts)


def run_to_end(plan: Schedule, replica: int = 0) -> list[Task | Commit]:
    """Answer everything at once; returns what was submitted."""
    submitted: list[Task | Commit] = []
    while due := list(plan.due(replica)):
        for action in due:
            submitted.append(action)
            if isinstance(action, Task):
                plan.finish(replica, action)
            else:
                plan.committed(replica, action.window)
    return submitted


@settings(max_examples=300)
@given(
    sizes=st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=6),
    in_flight=st.integers(1, 6),
    replicas=st.integers(1, 3),
    data=st.data(),
)
def test_whatever_dies_every_window_is_committed_once_from_all_its_sound_rollouts(
    sizes: list[list[int]], in_flight: int, replicas: int, data: st.DataObject
) -> None:
    """Replicas die at random, and always where a poisonous rollout is run."""
    rollouts = [(w, b, p) for w, batches in enumerate(sizes) for b, size in enumerate(batches) for p in range(size)]
    poison = data.draw(st.frozensets(st.sampled_from(rollouts), max_size=2)) if rollouts else frozenset()
    bad_luck = data.draw(st.integers(0, 6))
    lucky = bad_luck == 0
    plan = schedule(sizes, in_flight=in_flight)
    alive = list(range(replicas))
    for replica in alive:
        plan.join(replica)
    flying: list[tuple[int, Task | Commit]] = []
    kept: dict[tuple[int, int, int], frozenset[int]] = {}
    """Replica, window, micro-batch -> places left out."""
    committed: list[int] = []
    while True:
        for replica in alive:
            flying += [(replica, action) for action in plan.due(replica)]
            own = [action for owner, action in flying if owner == replica]
            assert sum(isinstance(action, Task) for action in own) <= in_flight
            assert len(own) == 1 or not any(isinstance(action, Task) and action.trial for action in own)
        if not flying:
            break
        replica, action = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        dies = bad_luck > 0 and data.draw(st.integers(0, 9)) == 0
        bad_luck -= dies
        if isinstance(action, Task):
            places = set(range(sizes[action.window][action.batch])) - action.blanked
            dies = dies or any((action.window, action.batch, place) in poison for place in places)
        if dies:
            if plan.leave(replica).hopeless is not None:
                assert not lucky
                return
            flying = [(owner, other) for owner, other in flying if owner != replica]
            alive[alive.index(replica)] = replica + replicas
            plan.join(replica + replicas)
        elif isinstance(action, Commit):
            plan.committed(replica, action.window)
            committed.append(action.window)
            for batch in range(len(sizes[action.window])):
                poisoned = {place for window, other, place in poison if (window, other) == (action.window, batch)}
                left_out = kept[(replica, action.window, batch)]
                assert left_out == poisoned if lucky else left_out >= poisoned
        else:
            plan.finish(replica, action)
            if not action.trial:
                kept[(replica, action.window, action.batch)] = action.blanked
    assert plan.done
    assert Counter(committed) == Counter(range(len(sizes)))


def test_batches_of_the_next_window_fill_the_pipe() -> None:
    plan = schedule([[1], [1, 1, 1]], in_flight=3)
    plan.join(0)
    assert [(task.window, task.batch) for task in plan.due(0) if isinstance(task, Task)] == [(0, 0), (1, 0), (1, 1)]


def test_a_window_without_micro_batches_is_committed_all_the_same() -> None:
    plan = schedule([[], [2]])
    plan.join(0)
    assert run_to_end(plan) == [Commit(window=0), Task(window=1, batch=0), Commit(window=1)]
    assert plan.done


def test_no_more_windows_are_computed_than_can_wait_for_their_writers() -> None:
    plan = schedule([[1]] * 5, in_flight=2)
    plan.join(0)
    actions: list[Task | Commit] = []
    while due := list(plan.due(0)):
        actions += due
        for action in due:
            if isinstance(action, Task):
                plan.finish(0, action)
    assert [action.window for action in actions if isinstance(action, Commit)] == [0, 1]
    plan.committed(0, 0)
    assert [action.window for action in plan.due(0)] == [2, 3]


def test_the_windows_of_a_lost_replica_come_first_and_are_counted() -> None:
    plan = schedule([[3, 4], [5], [6]], in_flight=2)
    plan.join(0)
    first, _ = plan.due(0)
    assert isinstance(first, Task)
    plan.finish(0, first)
    assert list(plan.due(0)) == [Task(window=1, batch=0)]
    assert plan.leave(0) == Loss(windows=2, rollouts=3, hopeless=None)
    plan.join(1)
    assert [(task.window, task.batch) for task in plan.due(1) if isinstance(task, Task)] == [(0, 0), (0, 1)]


def test_a_poisonous_rollout_is_found_and_left_out() -> None:
    """Place 1 of micro-batch 0 in window 0; the micro-batches beside it are suspected, and cleared."""
    plan = schedule([[4, 4], [2]])
    kept: dict[tuple[int, int], frozenset[int]] = {}
    deaths = 0
    plan.join(0)
    for _ in range(100):
        due = list(plan.due(0))
        if any((task.window, task.batch) == (0, 0) and 1 not in task.blanked for task in due if isinstance(task, Task)):
            deaths += 1
            assert plan.leave(0).hopeless is None
            kept.clear()
            plan.join(0)
            continue
        for action in due:
            if isinstance(action, Commit):
                plan.committed(0, action.window)
            else:
                plan.finish(0, action)
                kept |= {} if action.trial else {(action.window, action.batch): action.blanked}
    assert plan.done
    assert kept == {(0, 0): frozenset({1}), (0, 1): frozenset(), (1, 0): frozenset()}
    assert deaths == 2 + 1 + 2  # Two strikes; alone; half {0, 1}; {1}, after {0} has passed.


def test_a_trial_puts_no_other_work_at_risk() -> None:
    plan = schedule([[2], [1], [1]], in_flight=1, attempts=1)
    plan.join(0)
    plan.join(1)
    assert list(plan.due(0)) == [Task(window=0, batch=0)]
    [busy] = plan.due(1)
    assert busy == Task(window=1, batch=0)
    plan.leave(0)
    plan.finish(1, busy)
    assert list(plan.due(1)) == [Commit(window=1), Task(window=2, batch=0)], "window 0 is left to one that is free"
    plan.join(2)
    assert list(plan.due(2)) == [Task(window=0, batch=0)]
    plan.leave(2)
    plan.join(3)
    assert list(plan.due(3)) == [Task(window=0, batch=0, blanked=frozenset({0, 1}), trial=True)]


def test_a_window_that_ends_its_worker_whenever_it_is_stored_is_given_up() -> None:
    plan = schedule([[1], [1]], in_flight=1)
    for replica in range(3):
        plan.join(replica)
        [task] = plan.due(replica)
        assert isinstance(task, Task)
        plan.finish(replica, task)
        assert Commit(window=0) in plan.due(replica)
        loss = plan.leave(replica)
        assert loss.hopeless == (Commit(window=0) if replica == 2 else None)


def test_who_is_not_blamed_gets_no_strike() -> None:
    plan = schedule([[1], [1]], in_flight=2, attempts=1)
    plan.join(0)
    guilty, innocent = plan.due(0)
    assert isinstance(guilty, Task)
    plan.leave(0, blame=[guilty])
    plan.join(1)
    assert list(plan.due(1)) == [guilty]  # Alone.
    plan.finish(1, guilty)
    assert innocent in plan.due(1)


def test_a_machine_that_failed_blames_nobody() -> None:
    plan = schedule([[1], [1]], in_flight=2, attempts=1)
    for replica in range(5):
        plan.join(replica)
        assert len(list(plan.due(replica))) == 2
        plan.leave(replica, blame=[])
