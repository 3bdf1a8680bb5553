"""Workers that die, hang, or can't bear a rollout: the run ends with what an undisturbed one gives."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from personaspace.cluster import extraction, generation, generators
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Committed, Event, Quarantined, ReplicaLost
from personaspace.cluster.extraction import extract
from personaspace.cluster.faults import QUARANTINED
from personaspace.cluster.generation import generate
from personaspace.cluster.generators import Generator
from personaspace.cluster.job import Job
from personaspace.cluster.session import hold_run
from personaspace.cluster.stages import Order, Passed, Ran, StageActor
from personaspace.config import load_config
from personaspace.store import open_run
from personaspace.store.errors import WorkerError
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.cluster.small_jobs import committed_objects, job_for, job_of, make_place, talk

# Ray lets nobody inherit from an actor class, but from what it was made of.
StageWorker: Any = StageActor.__ray_metadata__.modified_class.__ray_actor_class__
GeneratorWorker: Any = Generator.__ray_metadata__.modified_class.__ray_actor_class__

TALKS = {
    "default": [talk("?", f"Number {number}.") for number in range(8)],
    "ghost": [talk("?", f"Boo {number}.") for number in range(8)],
}


def at_most(times: int, marks: Path) -> bool:
    """Whether this is still to happen; counted in files, since the processes that it happens to are gone."""
    marks.mkdir(exist_ok=True)
    if len(list(marks.iterdir())) >= times:
        return False
    (marks / str(time.monotonic_ns())).touch()
    return True


def saboteur(
    marks: Path,
    *,
    times: int = 0,
    number: int = signal.SIGKILL,
    poison: frozenset[str] = frozenset(),
    raises: bool = False,
) -> Any:
    """A stage actor whose last stage gets a signal, so many times, or can't bear some rollouts."""

    @ray.remote(concurrency_groups={"store": 1}, enable_tensor_transport=True)
    class Saboteur(StageWorker):
        def forward(self, order: Order, received: Passed | None) -> Passed | Ran:
            if self._spec.share.last:
                if order.window == 1 and at_most(times, marks):
                    os.kill(os.getpid(), number)
                alive = {name for place, name in enumerate(order.rollout_ids) if place not in order.left_out}
                if alive & poison:
                    os._exit(1)
                if raises:
                    return super().forward(replace(order, batch=None), received)
            return super().forward(order, received)

    return Saboteur


def run(job: Job, **config: Any) -> list[Event]:
    """Import and extract."""
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        for step in (generate, extract):
            step(job, fence, ClusterConfig(stages=2, **config), events.append)
    return events


def of_type(kind: type[Any], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def stored(job: Job) -> dict[str, bytes]:
    """All arrays as they are stored."""
    return {key: data for key, data in committed_objects(job.folder).items() if "/c/" in key}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"), TALKS)


@pytest.fixture(scope="module")
def undisturbed(own_ray: None, place: Path) -> dict[str, bytes]:
    job = job_for(place, "undisturbed")
    run(job)
    return stored(job)


@pytest.mark.usefixtures("own_ray")
def test_a_stage_that_is_killed_is_started_anew_and_nothing_changes(
    place: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "StageActor", saboteur(place / "killed", times=1))
    job = job_for(place, "killed-run")
    events = run(job)
    [loss] = of_type(ReplicaLost, events)
    assert re.fullmatch(r"a worker process died \(pid \d+ on [\d.]+\)", loss.reason)
    assert stored(job) == undisturbed


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_states_that_go_directly_give_the_same_and_survive_a_death(
    place: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Direct Transport, with gloo."""
    monkeypatch.setattr(extraction, "StageActor", saboteur(place / "killed-direct", times=1))
    job = job_for(place, "direct-run")
    events = run(job, transport="direct")
    assert len(of_type(ReplicaLost, events)) == 1
    assert stored(job) == undisturbed


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_a_stage_that_hangs_is_started_anew_and_nothing_changes(
    place: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "StageActor", saboteur(place / "hung", times=1, number=signal.SIGSTOP))
    job = job_for(place, "hung-run")
    events = run(job, stall_timeout=3)
    [loss] = of_type(ReplicaLost, events)
    assert loss.reason == "no answer for 3 s while at work"
    assert stored(job) == undisturbed


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_a_rollout_that_kills_its_worker_is_dropped_and_costs_no_other_anything(
    place: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(place, "poisoned-run")
    poison = job.rows[5].rollout_id
    monkeypatch.setattr(extraction, "StageActor", saboteur(place / "poisoned", poison=frozenset({poison})))
    events = run(job)
    [quarantined] = of_type(Quarantined, events)
    assert quarantined.rollouts == {poison: QUARANTINED}
    # Two attempts; alone; and a micro-batch of 8 halved three times, of which the half with the culprit dies.
    assert 3 < len(of_type(ReplicaLost, events)) <= 6
    kept = open_run(job.folder).load()
    assert kept["status"].values.tolist() == [1] * 5 + [2] + [1] * 10
    whole = open_run(job_for(place, "undisturbed").folder).load()
    others = np.delete(np.arange(16), 5)
    np.testing.assert_array_equal(kept[RESID_POST_MEAN].values[others], whole[RESID_POST_MEAN].values[others])
    assert verify(job.folder).problems == ()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
def test_work_that_always_fails_stops_the_run_and_blames_no_rollout(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "StageActor", saboteur(place / "faulty", raises=True))
    with pytest.raises(WorkerError) as caught:
        run(job_for(place, "faulty-run"), attempts=1)
    message = str(caught.value)
    assert message.startswith(
        "extract: a micro-batch ended its worker 3 times, even when it held nothing but dummies, so no rollout is to "
        "blame: stage of layers 4 to 5 failed on rollouts "
    )
    assert "AttributeError" in message
    assert message.endswith("What is committed is safe; the same command resumes.")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
def test_a_model_that_ends_every_worker_that_loads_it_stops_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @ray.remote(concurrency_groups={"store": 1}, enable_tensor_transport=True)
    class Dying(StageWorker):
        def load(self, meeting: str = "") -> None:
            os._exit(1)

    monkeypatch.setattr(extraction, "StageActor", Dying)
    with pytest.raises(WorkerError) as caught:
        run(job_for(place, "dying-run"))
    assert re.fullmatch(
        r"extract: 3 replicas in a row were lost while they loaded the model: a worker process died \(pid \d+ on "
        r"[\d.]+\)\nWhat is committed is safe; the same command resumes\.",
        str(caught.value),
    )


GENERATED = """
model: {{id: {model}, dtype: float32}}
personas: {{only: [ghost], prompts: 2, max_questions: 4}}
generate: {{max_new_tokens: 6, batch_rows: 8}}
store: {{root: {root}, run: {run}, unit_rows: 4, layer_group: 2}}
"""


def generated(place: Path, run: str) -> tuple[dict[str, tuple[int, ...]], list[Event]]:
    """Rollout id -> response tokens, and what was reported."""
    file = place / f"{run}.yaml"
    file.write_text(GENERATED.format(model=place / "model", root=place, run=run))
    job = job_of(load_config(file))
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        generate(job, fence, ClusterConfig(), events.append)
    rollouts = read_rollouts(job.folder).to_pylist()
    assert sorted(row["row"] for row in rollouts) == list(range(16))
    return {row["rollout_id"]: tuple(row["response_token_ids"]) for row in rollouts}, events


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_a_generator_that_dies_loses_and_doubles_no_rollout(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = generated(place, "whole")
    poison = list(whole)[6]
    marks = place / "generator"

    @ray.remote(concurrency_groups={"store": 1})
    class Saboteur(GeneratorWorker):
        def generate(self, order: generators.Order) -> generators.Sampled:
            rows = [row.rollout_id for unit in order.units for row in unit.rows]
            alive = [name for place, name in enumerate(rows) if place not in order.left_out]
            if poison in alive or at_most(1, marks):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().generate(order)

    monkeypatch.setattr(generation, "Generator", Saboteur)
    disturbed, events = generated(place, "disturbed")
    [quarantined] = of_type(Quarantined, events)
    assert quarantined.rollouts == {poison: QUARANTINED}
    assert disturbed == {**whole, poison: ()}
    [dropped] = [event.dropped for event in of_type(Committed, events) if event.dropped]
    assert list(dropped.values()) == [QUARANTINED]
