"""Conversations of several turns on real Ray: held, stored by turn, fitted around, exported, and seen in `preview`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel

from personaspace.analysis.config import AnalysisConfig
from personaspace.analysis.fit import compute_space
from personaspace.cli import main
from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.events import Note
from personaspace.cluster.extraction import extract
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job, prepare
from personaspace.cluster.session import hold_run
from personaspace.cluster.sharding import check_sharding
from personaspace.extract.config import (
    AuditorConfig,
    EndpointConfig,
    ExtractConfig,
    GenerateConfig,
    ModelConfig,
    PersonasConfig,
)
from personaspace.store import open_run
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError
from personaspace.store.exchange.export import export
from personaspace.store.manifest import require_manifest
from personaspace.store.objects import Folder
from personaspace.store.reader import open_spans
from personaspace.store.rollouts import Rollout, read_rollouts, to_rollouts
from personaspace.store.schema import RESID_POST_MEAN
from personaspace.store.verify import verify
from tests.models import tiny_checkpoint

ROLES = [
    {"id": "default", "kind": "assistant", "prompts": [""]},
    {"id": "ghost", "kind": "fantastical", "prompts": ["You are a ghost."]},
    {"id": "consultant", "kind": "professional", "prompts": ["You are a consultant."]},
]
QUESTIONS = [{"id": f"q{number}", "text": text} for number, text in enumerate(["Who are you?", "Why?", "Where?"])]
SCENARIOS = [
    {
        "id": f"{domain}.{number}",
        "domain": domain,
        "topic": f"The {domain}, part {number}.",
        "user": f"You are Ann {number}.",
        "system": "Be patient." if number == 1 else "",
        "turns": [f"What of the {domain}, {number}?", "And then?", f"What is left of the {domain}?", "Stay."],
    }
    for domain in ("sea", "night")
    for number in range(3)
]
TURNS = 3
COUNTS = {"turns": TURNS, "samples": 2, "default_samples": 2}


def config_files(folder: Path) -> dict[str, tuple[str, ...]]:
    files = {}
    for kind, entries in (("roles", ROLES), ("questions", QUESTIONS), ("scenarios", SCENARIOS)):
        file = folder / f"{kind}.yaml"
        file.write_text(yaml.safe_dump({"version": 1, kind: entries}))
        files[kind] = (str(file),)
    return files


def job_of(
    folder: Path,
    run: str,
    *,
    reductions: tuple[str, ...] = ("mean", "last_prompt", "turns"),
    grow: bool = False,
    capture: bool = False,
    **personas: Any,
) -> Job:
    return prepare(
        model=ModelConfig(id=str(folder / "model"), dtype="float32"),
        personas=PersonasConfig(
            **{**config_files(folder), "turns": TURNS, "samples": 2, "default_samples": 2, **personas}
        ),
        generate=GenerateConfig(max_new_tokens=8, batch_rows=8, capture=capture),
        extract=ExtractConfig(reductions=reductions, micro_batch_tokens=512, window_rows=16),
        store=StoreConfig(root=str(folder), run=run, precision="lossless", unit_rows=4, layer_group=2, grow=grow),
        execution={},
    )


def run_job(job: Job, **cluster: Any) -> None:
    with hold_run(job, say=print) as fence:
        for step in (generate, extract):
            step(job, fence, ClusterConfig(**cluster), lambda event: None)


def rollouts_of(folder: Folder) -> list[Rollout]:
    return to_rollouts(read_rollouts(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("conversations")
    settings = tiny_checkpoint(place / "model") / "config.json"
    # Whoever plays a user needs room for the instructions.
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_position_embeddings": 1024}))
    return place


@pytest.fixture(scope="module")
def mixed(folder: Path, own_ray: None) -> Job:
    """Roles and conversations in one run."""
    job = job_of(folder, "mixed")
    run_job(job, stages=2)
    return job


def test_conversations_are_planned_behind_the_roles(mixed: Job) -> None:
    manifest = require_manifest(mixed.folder)
    roles = [(role["id"], role["kind"], role["prompts"]) for role in manifest.tables["roles"][3:]]
    assert roles == [
        ("scenario.sea", "scenario", ["", "Be patient."]),
        ("scenario.night", "scenario", ["", "Be patient."]),
    ]
    run = open_run(mixed.folder)
    held = run.isel(rollout=np.flatnonzero(np.isin(run["role_id"].values, [3, 4])))
    assert held["role"].values.tolist() == ["scenario.sea"] * 6 + ["scenario.night"] * 6
    questions = [str(manifest.tables["questions"][number]["id"]) for number in held["question"].values]
    assert questions == [scenario["id"] for scenario in SCENARIOS for _ in range(2)]
    assert held["prompt"].values.tolist() == [0, 0, 1, 1, 0, 0] * 2
    assert held["sample"].values.tolist() == [0, 1] * 6
    assert not verify(mixed.folder).problems


def test_each_turn_has_a_row_that_averages_its_own_states(mixed: Job, folder: Path) -> None:
    run, spans = open_run(mixed.folder).load(), open_spans(mixed.folder).load()
    model = AutoModel.from_pretrained(folder / "model", dtype=torch.float32).eval()
    conversations = [one for one in rollouts_of(mixed.folder) if one.role.startswith("scenario.")]
    assert len(conversations) == 12
    for one in conversations:
        own = spans.isel(span=np.flatnonzero(spans["rollout"].values == one.row))
        assert own["turn"].values.tolist() == list(range(TURNS))
        assert [turn["tokens"] for turn in json.loads(one.sampling)["turns"]] == ["sampled"] * TURNS
        ids = torch.tensor([[*one.prompt_token_ids, *one.response_token_ids]])
        with torch.no_grad():
            # The last entry is normed; the blocks before it are not.
            states = torch.stack(model(ids, output_hidden_states=True).hidden_states[1:-1])[:, 0].numpy()
        for number, span in enumerate(span for span in one.spans if span.part == "whole"):
            expected = states[:, span.start : span.stop].mean(1)
            np.testing.assert_allclose(own[RESID_POST_MEAN].values[number, : len(states)], expected, atol=2e-5)
        last = run[RESID_POST_MEAN].values[one.row]
        np.testing.assert_allclose(own[RESID_POST_MEAN].values[-1], last, atol=1e-6)


@pytest.mark.nightly
def test_a_run_of_roles_grows_by_conversations_and_its_axis_stays(mixed: Job, folder: Path) -> None:
    config = AnalysisConfig(components=3, permutations=20)
    roles = job_of(folder, "grown", reductions=("mean",), scenarios=())
    run_job(roles)
    axis = compute_space(roles.folder, config)["axis"].values
    run_job(job_of(folder, "grown", reductions=("mean",), grow=True))
    for run in (roles.folder, mixed.folder):
        space = compute_space(run, config)
        assert space["role"].values.tolist() == ["ghost", "consultant"]
        assert space.attrs["default_count"] == 6
        np.testing.assert_allclose(space["axis"].values, axis, atol=1e-6)
    texts = [{one.rollout_id: one.response for one in rollouts_of(run)} for run in (roles.folder, mixed.folder)]
    assert texts[0] == texts[1]
    assert not verify(roles.folder).problems


def test_conversations_alone_are_the_same_ones(mixed: Job, folder: Path) -> None:
    """Another run, other units and batches: in float32 the same ids, texts and tokens."""
    alone = job_of(folder, "alone", roles=())
    run_job(alone)
    before = {one.rollout_id: one for one in rollouts_of(mixed.folder) if one.role.startswith("scenario.")}
    after = {one.rollout_id: one for one in rollouts_of(alone.folder)}
    assert len(after) == 12
    for name, one in after.items():
        places = {"row": 0, "role_id": 0, "question": 0}
        assert replace(one, **places) == replace(before[name], **places)
    with pytest.raises(InputError, match="needs `default` and at least two roles"):
        compute_space(alone.folder, AnalysisConfig())


def test_the_last_turn_is_captured_while_it_is_sampled(mixed: Job, folder: Path) -> None:
    """Where activations are taken while generating: those of each conversation's last turn, without a second pass."""
    captured = job_of(folder, "captured", reductions=("mean", "last_prompt"), capture=True, roles=())
    events: list[Any] = []
    with hold_run(captured, say=print) as fence:
        generate(captured, fence, ClusterConfig(), events.append)
    told = [event.text for event in events if isinstance(event, Note) and "activations captured" in event.text]
    assert len(told) == 1
    run, replayed = open_run(captured.folder).load(), open_run(mixed.folder).load()
    rows = np.flatnonzero(np.isin(replayed["role_id"].values, [3, 4]))
    for array in (RESID_POST_MEAN, "resid_post_last_prompt"):
        np.testing.assert_allclose(run[array].values[:12], replayed[array].values[rows], atol=2e-5)


def test_transcripts_are_exported(mixed: Job, tmp_path: Path) -> None:
    told: list[str] = []
    export(mixed.folder, tmp_path / "out", "transcripts", say=told.append)
    assert told[0] == f"{mixed.folder.url}: 12 conversations; left out: 0 dropped"
    files = sorted((tmp_path / "out").rglob("*.json"))
    assert [file.parent.name for file in files] == ["night"] * 6 + ["sea"] * 6
    one = next(one for one in rollouts_of(mixed.folder) if one.role == "scenario.night" and one.prompt == 1)
    [written] = [json.loads(file.read_text()) for file in files if one.rollout_id in file.name]
    assert list(written) == [
        *("model", "auditor_model", "domain", "persona_id", "persona", "topic_id", "topic", "turns"),
        *("conversation", "conversation_id", "scenario", "sample", "rollout_id"),
    ]
    assert (written["auditor_model"], written["domain"], written["turns"]) == ("script", "night", 6)
    assert written["topic"] == "The night, part 1."
    assert written["conversation"] == [*one.messages, {"role": "assistant", "content": one.response}]
    assert written["conversation"][0] == {"role": "system", "content": "Be patient."}
    with pytest.raises(InputError, match="exists"):
        export(mixed.folder, tmp_path / "out", "transcripts", say=told.append)
    export(mixed.folder, tmp_path / "sea", "transcripts", roles=["scenario.sea"], sample=1, say=told.append)
    assert len(list((tmp_path / "sea").rglob("*.json"))) == 3
    with pytest.raises(InputError, match=r"of 'ghost'; it has those of scenario\.sea, scenario\.night\.$"):
        export(mixed.folder, tmp_path / "no", "transcripts", roles=["ghost"])
    assert not (tmp_path / "no").exists()


def test_preview_shows_what_the_user_will_say(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = {
        "model": {"id": str(folder / "model")},
        "personas": {"roles": [], "scenarios": config_files(folder)["scenarios"][0], "turns": TURNS},
        "store": {"root": str(tmp_path), "run": "preview"},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    assert main(["preview", str(config), "--count", "1"]) == 0
    shown = capsys.readouterr().out
    assert "scenario.sea · prompt 0 · sea.0 · sample 0" in shown
    assert "turn 2 of 3, user: And then?" in shown
    assert "turn 3 of 3, user: What is left of the sea?" in shown
    played = ["--personas.auditor.played-by", "model"]
    assert main(["preview", str(config), "--count", "1", *played]) == 0
    assert "3 turns; the user is played: You are Ann 0." in capsys.readouterr().out


@pytest.mark.nightly
def test_the_model_plays_its_own_user_in_a_run(folder: Path, own_ray: None) -> None:
    job = job_of(folder, "own-user", roles=(), auditor=AuditorConfig(played_by="model", max_tokens=5))
    run_job(job)
    rollouts = rollouts_of(job.folder)
    scripted = {one["content"] for one in rollouts[0].messages if one["content"] == "And then?"}
    assert not scripted
    for one in rollouts:
        if one.dropped is None:
            assert [turn["role"] for turn in one.messages if turn["role"] != "system"] == ["user", "assistant"] * 2 + [
                "user"
            ]
            assert json.loads(one.sampling)["user"]["persona"].startswith("You are Ann")
    assert sum(one.dropped is None for one in rollouts) > 6


def test_an_endpoint_and_a_gang_do_not_go_together(folder: Path) -> None:
    job = job_of(
        folder, "gang", roles=(), auditor=AuditorConfig(played_by="endpoint", endpoint=EndpointConfig(model="eve"))
    )
    with pytest.raises(InputError, match=r"`endpoint` is not possible with cluster\.generation tensor"):
        check_sharding(job, ClusterConfig(generation="tensor"))
    check_sharding(job, ClusterConfig(generation="whole"))
