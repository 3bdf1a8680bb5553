"""The extract step on real Ray and real Zarr, against a plain forward pass of each rollout alone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Committed, Event
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run
from personaspace.extract.config import ExtractConfig, GenerateConfig, ModelConfig, PersonasConfig
from personaspace.store import open_run
from personaspace.store.config import StoreConfig
from personaspace.store.errors import IdentityError, InputError
from personaspace.store.freeze import freeze_run
from personaspace.store.index import is_current
from personaspace.store.lease import acquire
from personaspace.store.manifest import require_manifest
from personaspace.store.records import COORDINATES_RECORD, ROLLOUTS, committed_slots, read_records
from personaspace.store.rollouts import read_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from tests.models import tiny_checkpoint

ANSWERS = {"default": 5, "ghost": 7, "pirate": 5}


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    """17 finished responses of many lengths; one of ghost's is empty."""
    folder = tmp_path / "responses"
    folder.mkdir()
    for role, count in ANSWERS.items():
        lines = []
        for number in range(count):
            answer = "" if (role, number) == ("ghost", 3) else f"The {role} says: " + "so it goes, " * (1 + 3 * number)
            turns = [
                {"role": "system", "content": "" if role == "default" else f"You are a {role}."},
                {"role": "user", "content": f"Question {number}?"},
                {"role": "assistant", "content": answer.strip()},
            ]
            line = {"prompt_index": 0, "question_index": number, "question": f"Question {number}?", "label": "pos"}
            lines.append(json.dumps({**line, "system_prompt": turns[0]["content"], "conversation": turns}))
        (folder / f"{role}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def job_for(model: Path, responses: Path, root: Path, run: str) -> Job:
    return prepare(
        model=ModelConfig(id=str(model), dtype="float32"),
        personas=PersonasConfig(),
        generate=GenerateConfig(responses=str(responses)),
        extract=ExtractConfig(micro_batch_tokens=256, window_rows=8),
        store=StoreConfig(root=str(root), run=run, precision="lossless", unit_rows=4, layer_group=2),
        execution={},
    )


def run_job(job: Job, cluster: ClusterConfig) -> list[Event]:
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        generate(job, fence, cluster, events.append)
        extract(job, fence, cluster, events.append)
    return events


def plain_means(model: Path, job: Job) -> dict[int, np.ndarray]:
    """Row -> mean over the response of each block's output, one forward pass per rollout, nothing of ours."""
    backbone = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for block in backbone.layers:
        block.register_forward_hook(
            lambda _, __, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
        )
    means = {}
    for rollout in read_rollouts(job.folder).to_pylist():
        prompt, response = rollout["prompt_token_ids"], rollout["response_token_ids"]
        if response:
            seen.clear()
            with torch.inference_mode():
                backbone(torch.tensor([prompt + response]), use_cache=False)
            means[rollout["row"]] = np.stack([h[0, len(prompt) :].double().mean(0).numpy() for h in seen])
    return means


@pytest.mark.usefixtures("own_ray")
@pytest.mark.parametrize(
    ("family", "stages", "replicas"),
    [
        ("gemma2", 2, 1),
        pytest.param("llama", 1, 2, marks=pytest.mark.nightly),
        pytest.param("llama", 3, 1, marks=pytest.mark.nightly),
    ],
)
def test_stored_activations_are_those_of_a_plain_forward_pass(
    tmp_path: Path, responses: Path, family: str, stages: int, replicas: int
) -> None:
    model = tiny_checkpoint(tmp_path / "model", family)
    job = job_for(model, responses, tmp_path / "runs", "parity")
    run_job(job, ClusterConfig(stages=stages, replicas=replicas))
    run = open_run(job.folder.path)
    expected = plain_means(model, job)
    assert len(expected) == sum(ANSWERS.values()) - 1
    for row, means_LD in expected.items():
        stored_LD = run[RESID_POST_MEAN].values[row]
        error = np.linalg.norm(stored_LD - means_LD, axis=1) / np.linalg.norm(means_LD, axis=1)
        assert error.max() < 1e-5
    assert run["status"].values.tolist() == [1] * 8 + [2] + [1] * 8 + [3] * 3
    assert np.isnan(run[RESID_POST_MEAN].values[8]).all()


@pytest.mark.usefixtures("own_ray")
def test_dropped_rollouts_have_reasons_and_the_run_goes_on(tmp_path: Path, responses: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.4.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    job = job_for(model, responses, tmp_path / "runs", "broken")
    events = run_job(job, ClusterConfig(stages=2))
    dropped = {}
    for record in read_records(job.folder, RESID_POST_MEAN).values():
        dropped.update(record.dropped)
    assert dropped.pop(8) == "the response is empty"
    assert set(dropped) == set(range(17)) - {8}
    assert set(dropped.values()) == {"non-finite activations"}
    assert set(open_run(job.folder.path)["status"].values[:17]) == {2}
    extracted = [event for event in events if isinstance(event, Committed)][-1:]
    assert extracted


@pytest.mark.usefixtures("own_ray")
def test_resume_commits_only_what_is_missing_to_the_same_bytes(tmp_path: Path, responses: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    job = job_for(model, responses, tmp_path / "runs", "resumed")
    run_job(job, ClusterConfig(stages=2))
    group = job.folder.path / "activations.zarr"
    whole = {path: path.read_bytes() for path in group.rglob("*") if path.is_file()}
    orphan = group / RESID_POST_MEAN / "c" / "0" / "1" / "0"
    torn = group / RESID_POST_MEAN / "c" / "2" / "0" / "0"
    for unit, layer_group in ((0, 1), (2, 0), (4, 2)):
        (job.folder.path / f"commits/{unit:06d}/{RESID_POST_MEAN}.{layer_group:03d}.000.json").unlink()
        (job.folder.path / f"commits/{unit:06d}/coordinates.000.000.json").unlink()
    torn.write_bytes(torn.read_bytes()[:-1])
    (group / RESID_POST_MEAN / "c" / "4" / "2" / "0").unlink()
    run_job(job_for(model, responses, tmp_path / "runs", "resumed"), ClusterConfig(stages=3))
    assert {path: path.read_bytes() for path in group.rglob("*") if path.is_file()} == whole
    records = read_records(job.folder, RESID_POST_MEAN)
    assert records[(RESID_POST_MEAN, 0, 1)].adopted
    assert not records[(RESID_POST_MEAN, 2, 0)].adopted
    assert orphan in whole
    for record in records.values():
        [rollouts] = read_records(job.folder, ROLLOUTS, [record.unit]).values()
        assert record.source == rollouts.objects[0].sha256
    for record in read_records(job.folder, COORDINATES_RECORD).values():
        assert record.generation == 0
        assert record.covers == tuple(f"{RESID_POST_MEAN}.{layer_group:03d}" for layer_group in range(3))
    assert is_current(job.folder, require_manifest(job.folder), committed_slots(job.folder))


def test_extract_without_rollouts_says_what_to_run(tmp_path: Path, responses: Path) -> None:
    job = job_for(tiny_checkpoint(tmp_path / "model"), responses, tmp_path / "runs", "empty")
    with hold_run(job, say=print) as fence, pytest.raises(InputError, match="5 of 5 units have no rollouts; run `gen"):
        extract(job, fence, ClusterConfig(), lambda _: None)


def test_planning_writes_nothing_and_refuses_contradictions(tmp_path: Path, responses: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    job = job_for(model, responses, tmp_path / "runs", "planned")
    assert not (tmp_path / "runs").exists()
    assert job.layout.rows == 17
    with pytest.raises(InputError, match=r"personas.samples: has no effect together with generate.responses"):
        prepare(
            model=job.model,
            personas=PersonasConfig(samples=2),
            generate=job.generate,
            extract=job.extract,
            store=job.store,
            execution={},
        )
    with pytest.raises(InputError, match="is no folder and no transcript; give a folder that holds ROLE"):
        prepare(
            model=job.model,
            personas=PersonasConfig(),
            generate=replace(job.generate, responses=str(tmp_path / "nowhere")),
            extract=job.extract,
            store=job.store,
            execution={},
        )


def test_a_job_that_was_overtaken_while_getting_ready_changes_nothing(tmp_path: Path, responses: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    first, second = (job_for(model, responses, tmp_path / "runs", "shared") for _ in range(2))
    with hold_run(first, say=print):
        pass
    before = first.folder.get("run.json")
    message = (
        "another driver changed the run while this one was getting ready. Repeat the command. Nothing was changed."
    )
    with pytest.raises(IdentityError, match=re.escape(message)), hold_run(second, say=print):
        pass
    assert first.folder.get("run.json") == before
    third = job_for(model, responses, tmp_path / "runs", "shared")
    with hold_run(third, say=print) as fence:
        assert fence.epoch == 3
    assert [session["epoch"] for session in require_manifest(third.folder).sessions] == [1, 3]


def test_a_frozen_run_is_refused(tmp_path: Path, responses: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    job = job_for(model, responses, tmp_path / "runs", "frozen")
    with hold_run(job, say=print) as fence:
        freeze_run(fence, require_manifest(job.folder))
    with pytest.raises(InputError, match=r"runs/frozen: the run is frozen as [0-9a-f]{64}; nothing can be added"):
        job_for(model, responses, tmp_path / "runs", "frozen")


def test_a_run_that_was_frozen_while_a_job_got_ready_is_refused(tmp_path: Path, responses: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    with hold_run(job_for(model, responses, tmp_path / "runs", "frozen"), say=print):
        pass
    job = job_for(model, responses, tmp_path / "runs", "frozen")
    with acquire(job.folder, timeout=60, say=print) as lease:
        frozen = freeze_run(lease.fence, require_manifest(job.folder))
    with pytest.raises(IdentityError, match="another driver changed the run"), hold_run(job, say=print):
        pass
    assert require_manifest(job.folder) == frozen


def test_a_foreign_folder_is_not_taken_for_a_run(tmp_path: Path, responses: Path) -> None:
    job = job_for(tiny_checkpoint(tmp_path / "model"), responses, tmp_path / "runs", "foreign")
    (tmp_path / "runs" / "foreign").mkdir(parents=True)
    (tmp_path / "runs" / "foreign" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds \['thesis.tex'\], but no run.json"), hold_run(job, say=print):
        pass
