"""A run of a model that is changed while it runs: the same in one stage or two, captured or replayed, and resumed."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.engines import check_hooks
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run
from personaspace.extract.config import AuditorConfig, ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.extract.hooks import LayerHook
from personaspace.steer.interventions import Intervention, layer_hooks
from personaspace.store.config import StoreConfig
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.reader import open_run
from personaspace.store.rollouts import read_rollouts
from personaspace.store.verify import verify
from tests.models import tiny_checkpoint

ROLES = [{"id": name, "prompts": [f"You are {name}.", f"Speak as {name}."]} for name in ("ghost", "default")]
QUESTIONS = [{"id": f"x{number}", "text": text} for number, text in enumerate(("Who are you?", "Why?", "Where?"))]
VECTOR_D = np.random.default_rng(0).normal(size=32).astype(np.float32)

pytestmark = pytest.mark.usefixtures("own_ray")


def push(value: float, layer: int = 2, **settings: Any) -> Intervention:
    return Intervention(method="add", layer=layer, vector_D=VECTOR_D, value=value, **settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    tiny_checkpoint(place / "model")
    (place / "personas.yaml").write_text(yaml.safe_dump({"roles": ROLES, "questions": QUESTIONS}))
    return place


def job_for(place: Path, run: str, interventions: Sequence[Intervention] = (), *, capture: bool = False) -> Job:
    file = (str(place / "personas.yaml"),)
    model = ModelConfig(id=str(place / "model"), dtype="float32")
    hooks = layer_hooks(interventions)
    return prepare(
        model=model,
        personas=PersonasConfig(roles=file, questions=file),
        generate=GenerateConfig(max_new_tokens=10, batch_rows=8, capture=capture),
        extract=ExtractConfig(window_rows=8, micro_batch_tokens=256),
        store=StoreConfig(root=str(place), run=run, unit_rows=3, layer_group=2, precision="lossless"),
        execution={"config": {"model": asdict(model)}},
        hooks=hooks,
        steering={"values": [one.value for one in interventions]} if interventions else None,
    )


def work(job: Job, **cluster: Any) -> Job:
    config = ClusterConfig(device="cpu", **cluster)
    with hold_run(job, say=print) as fence:
        generate(job, fence, config, lambda _: None)
        extract(job, fence, config, lambda _: None)
    assert verify(job.folder).problems == ()
    return job


def texts(job: Job) -> list[str]:
    return [str(text) for text in read_rollouts(job.folder)["response"].to_pylist()]


def activations(job: Job) -> np.ndarray:
    return np.asarray(open_run(job.folder)["resid_post_mean"].values)


@pytest.fixture(scope="module")
def plain(place: Path, own_ray: None) -> Job:
    return work(job_for(place, "plain"))


@pytest.fixture(scope="module")
def pushed(place: Path, own_ray: None) -> Job:
    return work(job_for(place, "pushed", [push(20.0)]), stages=2)


def test_a_run_is_generated_and_read_steered(plain: Job, pushed: Job) -> None:
    assert texts(plain) != texts(pushed)
    assert plain.manifest.identity_hash != pushed.manifest.identity_hash
    ours, theirs = (set(read_rollouts(job.folder)["rollout_id"].to_pylist()) for job in (plain, pushed))
    assert not ours & theirs
    unit_D = VECTOR_D / np.linalg.norm(VECTOR_D)
    along_NL = (activations(pushed) - activations(plain)) @ unit_D
    assert (along_NL[:, :2] < 5).all()
    assert (along_NL[:, 2] > 15).all(), "what is stored is what the steered model computes"


def test_another_change_is_another_run(place: Path, pushed: Job) -> None:
    with pytest.raises(IdentityError, match="steer"):
        job_for(place, "pushed", [push(21.0)])
    with pytest.raises(IdentityError, match="steer"):
        job_for(place, "pushed")


@pytest.mark.slow
def test_the_noise_is_that_of_the_plain_run(place: Path, plain: Job) -> None:
    """So that two doses differ by the dose alone: one that does nothing gives the same texts."""
    idle = work(job_for(place, "idle", [push(0.0)]))
    assert texts(idle) == texts(plain)
    np.testing.assert_array_equal(activations(idle), activations(plain))


@pytest.mark.slow
def test_stages_and_capture_agree(place: Path, pushed: Job) -> None:
    staged = work(job_for(place, "staged", [push(20.0)]), stages=3)
    assert texts(staged) == texts(pushed)
    np.testing.assert_array_equal(activations(staged), activations(pushed))
    captured = work(job_for(place, "captured", [push(20.0)], capture=True))
    assert texts(captured) == texts(pushed)
    np.testing.assert_allclose(activations(captured), activations(pushed), atol=5e-5)


HOOK = LayerHook(layer=2, change=abs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hooks": [LayerHook(layer=6, change=abs)]}, "steer.layers: 6; the model has the layers 0 to 5"),
        ({"generate": GenerateConfig(engine="openai")}, "a server's model can't be changed from here"),
        ({"auditor": AuditorConfig(played_by="model")}, "the user would be changed, too"),
        (
            {
                "generate": GenerateConfig(batching="continuous"),
                "hooks": [LayerHook(layer=2, change=abs, positions="response")],
            },
            "Use generate.batching static, or steer.positions all",
        ),
    ],
)
def test_what_can_not_be_changed_is_refused(settings: dict[str, Any], message: str) -> None:
    usual = {"hooks": [HOOK], "generate": GenerateConfig(), "auditor": AuditorConfig(), "cluster": ClusterConfig()}
    with pytest.raises(InputError, match=message):
        check_hooks(**{"layers": 6, **usual, **settings})
