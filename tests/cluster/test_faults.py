"""Failures of real Ray workers as the user gets to read them."""

import os
import re

import pytest
import ray

from personaspace.cluster.faults import describe_loss, explain, user_error
from personaspace.store.errors import LeaseError, WorkerError


@ray.remote
class Worker:
    def fail(self, rollout_ids: list[str]) -> None:
        with explain("stage of layers 0 to 14", rollout_ids):
            raise ZeroDivisionError("no such luck")

    def fail_unexplained(self) -> None:
        raise KeyError("a bug")

    def fenced_out(self) -> None:
        with explain("stage of layers 0 to 14", ["a"]):
            raise LeaseError("lease epoch 1 has ended")

    def after(self, _: object) -> None:
        """Runs only if what it depends on succeeded."""

    def die(self) -> None:
        os._exit(1)


def error_of(reference: object) -> Exception | None:
    return user_error(raised_by(reference))


def raised_by(reference: object) -> Exception:
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(reference)
    return caught.value


@pytest.mark.usefixtures("own_ray")
def test_an_error_names_the_rollouts_and_keeps_the_traceback_even_through_later_stages() -> None:
    first, second = Worker.remote(), Worker.remote()
    error = error_of(second.after.remote(first.fail.remote(["r0", "r1", "r2", "r3", "r4"])))
    assert isinstance(error, WorkerError)
    assert "stage of layers 0 to 14 failed on rollouts r0, r1, r2, r3, ... (5 in all)" in str(error)
    assert str(error).count("ZeroDivisionError: no such luck") == 1


@pytest.mark.usefixtures("own_ray")
def test_an_error_for_the_user_passes_as_it_is() -> None:
    error = error_of(Worker.remote().fenced_out.remote())
    assert isinstance(error, LeaseError)
    assert str(error) == "lease epoch 1 has ended"


@pytest.mark.usefixtures("own_ray")
def test_any_other_error_keeps_its_traceback() -> None:
    error = error_of(Worker.remote().fail_unexplained.remote())
    assert isinstance(error, WorkerError)
    assert "in fail_unexplained" in str(error)
    assert "KeyError: 'a bug'" in str(error)


@pytest.mark.usefixtures("own_ray")
def test_a_stage_that_waits_for_a_dead_one_has_nothing_to_say_either() -> None:
    first, second = Worker.remote(), Worker.remote()
    assert user_error(raised_by(second.after.remote(first.die.remote()))) is None


@pytest.mark.usefixtures("own_ray")
def test_a_dead_worker_has_nothing_to_say_to_the_user() -> None:
    error = raised_by(Worker.remote().die.remote())
    assert user_error(error) is None
    assert re.fullmatch(r"a worker process died \(pid \d+ on [\d.]+\)", describe_loss(error))
