"""The schedule of a replica, as a state machine."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from personaspace.cluster.schedule import ReplicaSchedule, WindowPlan
from personaspace.extract.packing import MicroBatch


def plan(window: int, batches: int) -> WindowPlan:
    batch = MicroBatch(rows=(window,), token_ids=((1, 2),), segments=(((0, 2),),))
    return WindowPlan(window=window, batches=(batch,) * batches)


@given(
    sizes=st.lists(st.integers(1, 5), max_size=8),
    in_flight=st.integers(1, 6),
    replicas=st.integers(1, 3),
    data=st.data(),
)
def test_every_batch_runs_once_and_every_window_completes_once(
    sizes: list[int], in_flight: int, replicas: int, data: st.DataObject
) -> None:
    queue = deque(plan(window, size) for window, size in enumerate(sizes))
    schedules = [ReplicaSchedule(lambda: queue.popleft() if queue else None, in_flight) for _ in range(replicas)]
    flying: list[tuple[int, int]] = []
    submitted, complete = [], []
    while True:
        for index, schedule in enumerate(schedules):
            due = [(index, window) for window, _ in schedule.due()]
            submitted += [window for _, window in due]
            flying += due
            assert sum(replica == index for replica, _ in flying) <= in_flight
        if not flying:
            break
        index, window = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
        if schedules[index].finish(window):
            complete.append(window)
    assert sorted(submitted) == [window for window, size in enumerate(sizes) for _ in range(size)]
    assert sorted(complete) == list(range(len(sizes)))


def test_batches_of_the_next_window_fill_the_pipe() -> None:
    queue = deque([plan(0, 1), plan(1, 3)])
    schedule = ReplicaSchedule(lambda: queue.popleft() if queue else None, in_flight=3)
    assert [window for window, _ in schedule.due()] == [0, 1, 1]
