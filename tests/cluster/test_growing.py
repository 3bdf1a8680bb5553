"""Runs that grow, on real Ray: old bytes stay, new rows are those of a new run, new layers those of a full one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import yaml
from safetensors.torch import load_file, save_file

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import StepStarted
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.store import open_run
from personaspace.store.catalog import summarize
from personaspace.store.config import StoreConfig
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.layout import ZARR_GROUP
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.records import COORDINATES_RECORD, committed_slots, read_record, read_records
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.models import tiny_checkpoint

SMALL = {"default": [""], "ghost": ["You are a ghost.", "Haunt the house."]}
LARGE = {"pirate": ["You are a pirate."], "ghost": ["Walk through walls.", *SMALL["ghost"]], "default": [""]}
"""The same roles in another order, one more, and one more prompt in front."""
QUESTIONS = ["Who are you?", "What do you see?", "What should I do?", "Where is the sea?", "What is the night like?"]


@dataclass(frozen=True)
class Place:
    """Where the runs of this module are, and their model."""

    folder: Path
    model: Path

    def personas(self, name: str, roles: dict[str, list[str]], questions: list[int]) -> PersonasConfig:
        files = {}
        for kind, entries in (
            (
                "roles",
                [{"id": role, "kind": "any", "description": role, "prompts": texts} for role, texts in roles.items()],
            ),
            ("questions", [{"id": f"q{number}", "category": "any", "text": QUESTIONS[number]} for number in questions]),
        ):
            files[kind] = self.folder / f"{name}-{kind}.yaml"
            files[kind].write_text(yaml.safe_dump({"version": 1, kind: entries}))
        return PersonasConfig(roles=(str(files["roles"]),), questions=(str(files["questions"]),))

    def job(
        self,
        run: str,
        personas: PersonasConfig,
        *,
        grow: bool = False,
        layers: tuple[int, ...] | None = None,
        unit_rows: int | None = 4,
    ) -> Job:
        return prepare(
            model=ModelConfig(id=str(self.model), dtype="float32"),
            personas=personas,
            generate=GenerateConfig(max_new_tokens=6, batch_rows=8),
            extract=ExtractConfig(micro_batch_tokens=256, window_rows=8, layers=layers),
            store=StoreConfig(
                root=str(self.folder), run=run, precision="lossless", unit_rows=unit_rows, layer_group=2, grow=grow
            ),
            execution={},
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("growing")
    return Place(folder=folder, model=tiny_checkpoint(folder / "model"))


def run_job(job: Job, *, stages: int = 1) -> list[int]:
    """Carry out the job; returns how many rows each step found done."""
    events: list[Any] = []
    with hold_run(job, say=print) as fence:
        for step in (generate, extract):
            step(job, fence, ClusterConfig(stages=stages), events.append)
    return [event.rows_done for event in events if isinstance(event, StepStarted)]


def objects(folder: Folder) -> dict[str, bytes]:
    """Everything that is committed, its records, and the plan: what growth must not touch."""
    return {
        entry.key: folder.get(entry.key)
        for entry in folder.list()
        if entry.key.startswith(("commits/", "rollouts/", "plan/")) or "/c/" in entry.key
    }


def by_id(run: xr.Dataset) -> dict[str, np.ndarray]:
    """Rollout id -> its activations."""
    values = run[RESID_POST_MEAN].values
    return {str(identity): values[row] for row, identity in enumerate(run["rollout_id"].values) if identity}


@dataclass(frozen=True)
class Grown:
    """A run before and after it grew."""

    folder: Folder
    before: dict[str, bytes]
    run_before: xr.Dataset
    rows_done: list[int]


@pytest.fixture(scope="module")
def grown(place: Place, own_ray: None) -> Grown:
    small = place.personas("small", SMALL, [0, 1, 2])
    folder = place.job("grown", small).folder
    assert run_job(place.job("grown", small)) == [0, 0]
    before, run_before = objects(folder), open_run(folder).load()
    rows_done = run_job(place.job("grown", place.personas("large", LARGE, [3, 2, 0, 1]), grow=True), stages=2)
    return Grown(folder=folder, before=before, run_before=run_before, rows_done=rows_done)


def test_nothing_that_was_stored_is_touched(grown: Grown) -> None:
    after = objects(grown.folder)
    assert {key: after[key] for key in grown.before} == grown.before
    assert len(after) > len(grown.before)
    assert grown.rows_done == [9, 9]
    xr.testing.assert_identical(
        open_run(grown.folder).isel(rollout=slice(0, 12)).load().drop_attrs(), grown.run_before.drop_attrs()
    )


def test_all_rows_are_there_each_with_its_own_conversation(grown: Grown) -> None:
    run, manifest = open_run(grown.folder), require_manifest(grown.folder)
    assert manifest.layout.segments == (9, 11)
    assert (run["status"].values == 1).sum() == 20
    assert run["status"].values.tolist() == [1] * 9 + [3] * 3 + [1] * 11 + [3]
    assert np.isfinite(run[RESID_POST_MEAN].values[run["status"].values == 1]).all()
    assert [role["id"] for role in manifest.tables["roles"]] == ["default", "ghost", "pirate"]
    assert manifest.tables["roles"][1]["prompts"] == [*SMALL["ghost"], "Walk through walls."]
    assert [question["id"] for question in manifest.tables["questions"]] == ["q0", "q1", "q2", "q3"]
    rollouts = read_rollouts(grown.folder).to_pylist()
    assert [rollout["row"] for rollout in rollouts] == [*range(9), *range(12, 23)]
    for rollout in rollouts:
        row = rollout["row"]
        assert run["rollout_id"].values[row] == rollout["rollout_id"]
        role = manifest.tables["roles"][int(run["role_id"].values[row])]
        assert run["role"].values[row] == rollout["role"] == role["id"]
        system = role["prompts"][int(run["prompt"].values[row])]
        question = manifest.tables["questions"][int(run["question"].values[row])]["text"]
        texts = [message["content"] for message in rollout["messages"]]
        assert texts == ([system, question] if system else [question])
        assert run["n_tokens"].values[row] == len(rollout["response_token_ids"])


def test_a_grown_run_is_whole(grown: Grown) -> None:
    assert summarize(grown.folder).state == "complete"
    assert verify(grown.folder).problems == ()
    assert [session["epoch"] for session in require_manifest(grown.folder).sessions] == [1, 2]


def test_new_rows_are_those_of_a_new_run(grown: Grown, place: Place) -> None:
    job = place.job("fresh", place.personas("fresh", LARGE, [0, 1, 2, 3]), unit_rows=5)
    run_job(job)
    fresh, ours = by_id(open_run(job.folder)), by_id(open_run(grown.folder))
    assert fresh.keys() == ours.keys()
    answers = {
        folder.name: {entry["rollout_id"]: entry["response"] for entry in read_rollouts(folder).to_pylist()}
        for folder in (job.folder, grown.folder)
    }
    assert answers["fresh"] == answers["grown"]
    for identity, values in fresh.items():
        np.testing.assert_allclose(ours[identity], values, rtol=1e-5, atol=1e-5)


def test_growing_again_by_nothing_adds_nothing(grown: Grown, place: Place) -> None:
    before = objects(grown.folder)
    job = place.job("grown", place.personas("same", LARGE, [0, 1, 2, 3]), grow=True)
    assert job.layout.segments == (9, 11)
    assert job.planned_rows() == place.job("grown", place.personas("same", LARGE, [0, 1, 2, 3])).planned_rows()
    assert run_job(job) == [20, 20]
    assert objects(grown.folder) == before


def test_the_smaller_config_is_refused_without_grow(grown: Grown, place: Place) -> None:
    before = {entry.key: grown.folder.get(entry.key) for entry in grown.folder.list()}
    small = place.personas("small-again", SMALL, [0, 1, 2])
    message = "this run has 20 rollouts; the config plans 0 that it does not have, and lacks 11 of its own."
    with pytest.raises(IdentityError, match=re.escape(message)) as error:
        place.job("grown", small)
    assert "Add --store.grow" in str(error.value)
    assert {entry.key: grown.folder.get(entry.key) for entry in grown.folder.list()} == before
    assert place.job("grown", small, grow=True).layout.segments == (9, 11)


def test_a_larger_config_is_refused_without_grow(grown: Grown, place: Place) -> None:
    larger = place.personas("larger", LARGE, [0, 1, 2, 3, 4])
    message = "this run has 20 rollouts; the config plans 5 that it does not have, and lacks 0 of its own."
    with pytest.raises(IdentityError, match=re.escape(message)):
        place.job("grown", larger)


def test_other_settings_are_refused_with_grow_too(grown: Grown, place: Place) -> None:
    with pytest.raises(IdentityError, match=r"store\.unit_rows: 4 -> 5"):
        place.job("grown", place.personas("large", LARGE, [0, 1, 2, 3]), grow=True, unit_rows=5)


@pytest.mark.nightly
def test_a_run_that_only_planned_its_growth_can_be_read_and_goes_on(place: Place, own_ray: None) -> None:
    """The driver dies right after run.json; another config, that lacks the new rollouts, can't go on."""
    small, large = (place.personas(f"half-{len(roles)}", roles, [0, 1]) for roles in (SMALL, LARGE))
    run_job(place.job("half", small))
    with hold_run(place.job("half", large, grow=True), say=print):
        pass
    folder = place.job("half", large).folder
    run = open_run(folder)
    assert run["status"].values.tolist() == [1] * 6 + [3] * 2 + [0] * 4
    assert run["role"].values.tolist() == ["default"] * 2 + ["ghost"] * 4 + [""] * 2 + ["pirate"] * 2 + ["ghost"] * 2
    assert run.attrs["rollouts"] == "10 planned: 6 ok, 0 dropped, 4 pending"
    assert summarize(folder).state == "partial"
    lacking = place.job("half", small, grow=True)
    message = (
        r"^personas: 4 rollouts of unit 2 \(such as [0-9a-f]{16}, role 'pirate'\) belong to this run, are not "
        r"generated yet, and are not in the config\. Give a config that has their roles, prompts and questions\.$"
    )
    with pytest.raises(InputError, match=message), hold_run(lacking, say=print) as fence:
        generate(lacking, fence, ClusterConfig(), lambda _: None)
    assert run_job(place.job("half", large)) == [6, 6]
    assert summarize(folder).state == "complete"


def imported(model: Path, run: str, *, grow: bool = False, layers: tuple[int, ...] | None = None) -> Job:
    """A run of six finished responses, two units."""
    folder = model.parent / "responses"
    folder.mkdir(exist_ok=True)
    for role in ("default", "ghost"):
        lines = []
        for number in range(3):
            turns = [
                {"role": "user", "content": QUESTIONS[number]},
                {"role": "assistant", "content": f"The {role} says so."},
            ]
            line = {"prompt_index": 0, "question_index": number, "question": QUESTIONS[number], "label": "pos"}
            lines.append(json.dumps({**line, "system_prompt": "", "conversation": turns}))
        (folder / f"{role}.jsonl").write_text("\n".join(lines) + "\n")
    return prepare(
        model=ModelConfig(id=str(model), dtype="float32"),
        personas=PersonasConfig(),
        generate=GenerateConfig(responses=str(folder)),
        extract=ExtractConfig(layers=layers),
        store=StoreConfig(root=str(model.parent), run=run, unit_rows=4, layer_group=2, grow=grow),
        execution={},
    )


@pytest.mark.nightly
def test_layers_are_added_and_the_coordinates_say_so(place: Place, own_ray: None) -> None:
    job = imported(place.model, "layers", layers=(0, 1))
    run_job(job)
    run = open_run(job.folder)
    assert np.isfinite(run[RESID_POST_MEAN].values[:6, :2]).all()
    assert np.isnan(run[RESID_POST_MEAN].values[:, 2:]).all()
    assert run["status"].values.tolist() == [1] * 6 + [3] * 2
    assert run.attrs[RESID_POST_MEAN] == "2 of 6 layers complete"
    assert summarize(job.folder).state == "complete"
    before = objects(job.folder)
    covers = {unit: record.covers for (_, unit, _), record in read_records(job.folder, COORDINATES_RECORD).items()}
    assert covers == dict.fromkeys((0, 1), (f"{RESID_POST_MEAN}.000",))

    message = (
        f"{job.folder.url}: the config asks for more than this run stores (other layers). Add --store.grow to extract "
        "that, too. Nothing was changed."
    )
    for layers in (None, (0, 4)):
        with pytest.raises(IdentityError, match=f"^{re.escape(message)}$"):
            imported(place.model, "layers", layers=layers)
    assert [spec.layers for spec in imported(place.model, "layers", layers=(1,)).manifest.arrays] == [(0, 1)]

    run_job(imported(place.model, "layers", grow=True), stages=2)
    after = objects(job.folder)
    assert {key: after[key] for key in before} == before
    slots = committed_slots(job.folder)
    for unit in (0, 1):
        slot = (COORDINATES_RECORD, unit, 0)
        assert slots[slot] == 1
        record = read_record(job.folder, slot, 1)
        assert record.covers == tuple(f"{RESID_POST_MEAN}.{group:03d}" for group in range(3))
        assert record.objects == read_record(job.folder, slot, 0).objects
    assert all(number == 0 for (array, _, _), number in slots.items() if array != COORDINATES_RECORD)
    assert summarize(job.folder).layers == (0, 1, 2, 3, 4, 5)
    assert verify(job.folder).problems == ()

    whole = imported(place.model, "whole")
    run_job(whole)
    xr.testing.assert_equal(open_run(job.folder).load(), open_run(whole.folder).load())
    for key, data in objects(whole.folder).items():
        if key.startswith(f"{ZARR_GROUP}/"):
            assert after[key] == data
    # With all layers there, a config that asks for some goes on as it is.
    assert [spec.layers for spec in imported(place.model, "layers", layers=(0, 1)).manifest.arrays] == [None]


@pytest.mark.nightly
def test_layers_that_become_unusable_drop_the_rollout(place: Place, own_ray: None) -> None:
    """A row may be sound in the first layers and not finite in a later one: the next coordinates say so."""
    model = tiny_checkpoint(place.folder / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    job = imported(model, "broken-run", layers=(0, 1))
    run_job(job)
    assert open_run(job.folder)["status"].values.tolist() == [1] * 6 + [3] * 2
    run_job(imported(model, "broken-run", grow=True))
    run = open_run(job.folder)
    assert run["status"].values.tolist() == [2] * 6 + [3] * 2
    assert run.attrs["rollouts"] == "6 planned: 0 ok, 6 dropped, 0 pending"
    assert np.isfinite(run[RESID_POST_MEAN].values[:6, :4]).all()
    assert np.isnan(run[RESID_POST_MEAN].values[:6, 4:]).all()
    record = read_record(job.folder, (COORDINATES_RECORD, 0, 0), 1)
    assert record.dropped == dict.fromkeys(range(4), "non-finite activations")


@pytest.mark.parametrize("layers", [(6,), (-1, 2), ()])
def test_layers_that_the_model_lacks_are_refused(place: Place, layers: tuple[int, ...]) -> None:
    personas = place.personas("refused", SMALL, [0])
    with pytest.raises(InputError, match=r"^extract\.layers: .*; give some of the layers 0 to 5\.$"):
        place.job("refused", personas, layers=layers)
