"""Capturing while generating, end to end: the same store as a second pass gives, resumed and repaired by replay."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Event, Note, ReplicaStarted, StepStarted
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.store.config import StoreConfig
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.reader import open_run
from personaspace.store.records import ROLLOUTS, read_slots
from personaspace.store.verify import verify
from tests.models import tiny_checkpoint

ROLES = [{"id": name, "prompts": [f"You are {name}.", f"Speak as {name}."]} for name in ("ghost", "poet", "default")]
QUESTIONS = [{"id": f"x{number}", "text": text} for number, text in enumerate(("Who are you?", "Why?", "Where?"))]

pytestmark = pytest.mark.usefixtures("own_ray")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, three roles and three questions."""
    place = tmp_path_factory.mktemp("place")
    tiny_checkpoint(place / "model")
    (place / "personas.yaml").write_text(yaml.safe_dump({"roles": ROLES, "questions": QUESTIONS}))
    return place


def job_for(
    place: Path, run: str, *, capture: bool = True, reductions: Sequence[str] = ("mean",), **extraction: Any
) -> Job:
    file = (str(place / "personas.yaml"),)
    model = ModelConfig(id=str(place / "model"), dtype="float32")
    return prepare(
        model=model,
        personas=PersonasConfig(roles=file, questions=file),
        generate=GenerateConfig(max_new_tokens=10, batch_rows=8, capture=capture),
        extract=ExtractConfig(reductions=tuple(reductions), window_rows=8, micro_batch_tokens=256, **extraction),
        store=StoreConfig(root=str(place), run=run, unit_rows=3, layer_group=2, precision="lossless"),
        execution={"config": {"model": asdict(model)}},
    )


def work(job: Job, *steps: str, **cluster: Any) -> list[Event]:
    events: list[Event] = []
    config = ClusterConfig(device="cpu", **cluster)
    with hold_run(job, say=print) as fence:
        for step in steps:
            {"generate": generate, "extract": extract}[step](job, fence, config, events.append)
    return events


def test_it_gives_the_store_that_a_second_pass_gives(place: Path) -> None:
    reductions = ("mean", "last_prompt", "first_4")
    captured = job_for(place, "captured", reductions=reductions)
    events = work(captured, "generate", "extract")
    replayed = job_for(place, "replayed", capture=False, reductions=reductions)
    work(replayed, "generate", "extract")

    extraction = events[next(i for i, e in enumerate(events) if isinstance(e, StepStarted) and e.step == "extract") :]
    assert not [event for event in extraction if isinstance(event, ReplicaStarted)], "nothing is left for a second pass"
    ours, theirs = open_run(captured.folder), open_run(replayed.folder)
    assert ours["n_tokens"].values.tolist() == theirs["n_tokens"].values.tolist()
    assert set(ours["status"].values.tolist()) == set(theirs["status"].values.tolist())
    for name in ("resid_post_mean", "resid_post_last_prompt", "resid_post_first_4"):
        np.testing.assert_allclose(ours[name].values, theirs[name].values, atol=2e-5)
    assert verify(captured.folder).problems == ()

    shards = {slot: n for slot, n in captured.committed().items() if slot[0].startswith("resid_post")}
    records = read_slots(captured.folder, shards).values()
    assert all(record.agreement is not None and record.agreement.cosine > 0.999999 for record in records)
    [said] = [event.text for event in events if isinstance(event, Note) and "captured" in event.text]
    assert re.fullmatch(
        r"generate: activations captured\. 6 rollouts ran again whole, and agree: cosine at least (1\.0{6}|0\.9{5}\d), "
        r"difference at most 0\.0\d%",
        said,
    )


@pytest.mark.nightly
def test_what_was_not_captured_is_replayed(place: Path) -> None:
    """Shards that are missing, for whatever reason, come by a second pass; what it gives fits in."""
    job = job_for(place, "half")
    work(job, "generate")
    lost = [slot for slot in job.committed() if slot[0].startswith("resid_post") and slot[1] in (1, 4)]
    for array, unit, group in lost:
        job.folder.delete(f"commits/{unit:06d}/{array}.{group:03d}.000.json")
        job.folder.delete(f"activations.zarr/resid_post_mean/c/{unit}/{group}/0")
    job = job_for(place, "half")
    work(job, "extract")
    whole = open_run(job_for(place, "captured", reductions=("mean", "last_prompt", "first_4")).folder)
    found = open_run(job.folder)
    np.testing.assert_allclose(found["resid_post_mean"].values, whole["resid_post_mean"].values, atol=2e-5)
    records = read_slots(job.folder, {slot: n for slot, n in job.committed().items() if slot in lost})
    assert {record.agreement for record in records.values()} == {None}


def test_only_some_layers(place: Path) -> None:
    job = job_for(place, "layers", layers=(1, 5))
    work(job, "generate", "extract")
    whole = open_run(job_for(place, "captured", reductions=("mean", "last_prompt", "first_4")).folder)
    found = open_run(job.folder)["resid_post_mean"].values
    np.testing.assert_allclose(found[:, [0, 1, 4, 5]], whole["resid_post_mean"].values[:, [0, 1, 4, 5]], atol=2e-5)
    assert np.isnan(found[:, 2:4]).all()


def test_it_is_part_of_what_a_run_is(place: Path) -> None:
    job = job_for(place, "captured", reductions=("mean", "last_prompt", "first_4"))
    assert job.manifest.identity["extract"]["captured"] is True
    with pytest.raises(IdentityError, match="captured"):
        job_for(place, "captured", capture=False, reductions=("mean", "last_prompt", "first_4"))
    with pytest.raises(InputError, match=r"generate\.capture: the reductions `turns` and `parts` need finished"):
        job_for(place, "turns", reductions=("mean", "turns"))
    assert len([slot for slot in job.committed() if slot[0] == ROLLOUTS]) == job.layout.units
    assert replace(job.generate, capture=False) != job.generate
