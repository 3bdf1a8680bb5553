"""Engines other than transformers' own: what is refused, what they need of a cluster, and a server behind Ray."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.engines import check_engine, choose_crew
from personaspace.cluster.events import Event
from personaspace.cluster.generation import generate
from personaspace.cluster.job import Job
from personaspace.cluster.room import Node, Workers, room
from personaspace.cluster.session import hold_run
from personaspace.config import RunConfig
from personaspace.extract.config import EndpointConfig, GenerateConfig, ModelConfig, PersonasConfig, VllmConfig
from personaspace.store.config import StoreConfig
from personaspace.store.errors import InputError
from personaspace.store.local import LocalFolder
from personaspace.store.records import committed_slots, record_key
from personaspace.store.rollouts import read_rollouts, to_rollouts
from tests.cluster.small_jobs import job_of
from tests.extract.generate.completions_server import Fault
from tests.extract.generate.test_openai_engine import Model
from tests.models import tiny_checkpoint

SERVER = EndpointConfig(base_url="http://127.0.0.1:1/v1")
PYTHON = "/opt/vllm/bin/python"


def node(cpus: float, gpus: float = 0) -> Node:
    return Node(id="n", address="10.0.0.1", cpus=cpus, gpus=gpus, memory=1e10, object_store=1e9)


@pytest.mark.parametrize(
    ("generate", "cluster", "message"),
    [
        (
            {"engine": "openai"},
            {},
            "generate.endpoint.base_url: is missing; give the server's address, such as http://HOST:8000/v1 or https://api.openai.com/v1.",
        ),
        (
            {"engine": "openai", "endpoint": SERVER},
            {"generation": "tensor"},
            (
                "cluster.generation: tensor has no effect with generate.engine openai, where the server holds the "
                "model. Remove it."
            ),
        ),
        (
            {"endpoint": SERVER},
            {},
            (
                "generate.endpoint.base_url: http://127.0.0.1:1/v1 is asked by generate.engine openai only, and it is "
                "transformers."
            ),
        ),
        (
            {"engine": "vllm", "responses": "."},
            {},
            (
                "generate.engine: vllm has no effect together with generate.responses, where nothing is sampled. "
                "Remove one of the two."
            ),
        ),
        (
            {"engine": "openai", "endpoint": SERVER, "capture": True},
            {},
            "generate.capture: a server gives no activations. Remove it, or use another engine.",
        ),
        (
            {"engine": "vllm", "capture": True},
            {"vllm": VllmConfig(eager=False)},
            "cluster.vllm.eager: false, and generate.capture reads vLLM's model in eager mode only.",
        ),
        (
            {"engine": "openai", "batching": "continuous"},
            {},
            (
                "generate.batching: continuous is for generate.engine transformers, and it is openai. Remove one of "
                "the two."
            ),
        ),
        (
            {"engine": "vllm"},
            {"generation": "offload"},
            (
                "cluster.generation: offload, which vLLM does not do. Use `whole`, or `tensor` over more GPUs, or "
                "generate.engine transformers."
            ),
        ),
        (
            {"engine": "vllm"},
            {"vllm": VllmConfig(python="bin/python")},
            "cluster.vllm.python: bin/python is relative; give the path that it has on every node.",
        ),
        (
            {"engine": "vllm"},
            {"vllm": VllmConfig(python="/nowhere/bin/python")},
            "cluster.vllm.python: /nowhere/bin/python does not exist. Build the environment (`make vllm`).",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, generate: dict[str, Any], cluster: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError) as error:
        check_engine(GenerateConfig(**generate), ClusterConfig(**cluster))
    assert str(error.value) == message


def test_what_can_be_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(GenerateConfig(), ClusterConfig())
    check_engine(GenerateConfig(engine="openai", endpoint=SERVER), ClusterConfig())
    # What the nodes of a cluster have can't be seen from here.
    vllm = VllmConfig(python="/nowhere/bin/python")
    check_engine(GenerateConfig(engine="vllm"), ClusterConfig(address="head:6379", generation="tensor", vllm=vllm))


def test_vllm_gets_all_gpus_of_its_ranks_in_one_actor() -> None:
    nodes = [node(32, 8), node(32, 8)]
    cluster = ClusterConfig(generation="tensor", ranks=4, vllm=VllmConfig(python=PYTHON))
    crew = choose_crew(GenerateConfig(engine="vllm"), cluster, nodes)
    assert (crew.actors, crew.ranks) == (1, 4)
    assert crew.workers == Workers(device="cuda", cpus=16.0, gpus=4)
    assert crew.options == {"runtime_env": {"py_executable": PYTHON}}
    assert room(nodes, crew.workers, crew.actors) == 4
    assert room([node(32, 7)], crew.workers, crew.actors) == 1
    # Offloaded extraction says nothing of it, and one GPU each is the default.
    one = choose_crew(GenerateConfig(engine="vllm"), ClusterConfig(sharding="offload"), nodes)
    assert (one.actors, one.ranks, one.workers.gpus, one.options) == (1, 1, 1, {})
    assert choose_crew(GenerateConfig(), cluster, nodes).actors == 4


def test_a_servers_client_takes_no_gpu_and_waits_as_long_as_it_may() -> None:
    endpoint = replace(SERVER, concurrency=16, timeout=100.0, retries=1)
    crew = choose_crew(GenerateConfig(engine="openai", endpoint=endpoint), ClusterConfig(), [node(32, 8)])
    assert crew.workers == Workers(device="cpu", cpus=1.0, gpus=0)
    assert (crew.actors, crew.replicas) == (1, 1)
    assert crew.stall_timeout == 4 * 2 * (100 + 120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", layers=2))


def job(model: Model, root: Path, run: str, **settings: Any) -> Job:
    return job_of(
        RunConfig(
            model=ModelConfig(id=model.checkpoint.source, dtype="float32"),
            personas=PersonasConfig(only=("pirate", "ghost"), prompts=1, max_questions=4),
            generate=GenerateConfig(max_new_tokens=12, batch_rows=8, **settings),
            store=StoreConfig(root=str(root), run=run, unit_rows=2, layer_group=1),
        )
    )


def sampled(job: Job) -> list[tuple[str, list[int], str]]:
    generate_all(job)
    rollouts = to_rollouts(read_rollouts(job.folder))
    return [(rollout.role, rollout.response_token_ids, rollout.finish_reason) for rollout in rollouts]


def generate_all(job: Job) -> list[Event]:
    events: list[Event] = []
    with hold_run(job, say=print) as fence:
        generate(job, fence, ClusterConfig(device="cpu"), events.append)
    return events


@pytest.mark.nightly
@pytest.mark.usefixtures("own_ray")
def test_a_server_behind_ray(model: Model, tmp_path: Path) -> None:
    with model.serve(name=model.checkpoint.source) as server:
        endpoint = EndpointConfig(base_url=server.url, retries=2)
        asking = job(model, tmp_path, "asked", engine="openai", endpoint=endpoint)
        server.faults.extend([Fault(500, ""), Fault(429, "{}", {"Retry-After": "0.1"})])
        found = sampled(asking)
        assert len(server.asked) == len(found) + 2 == 14
        # The seeds come from other rollout ids: the engine is part of a rollout's identity.
        own = job(model, tmp_path, "own")
        assert {row.rollout_id for row in own.plan.rows}.isdisjoint(row.rollout_id for row in asking.plan.rows)
        prompts = [rollout.prompt_token_ids for rollout in to_rollouts(read_rollouts(asking.folder))]
        seeds = [rollout.seed for rollout in to_rollouts(read_rollouts(asking.folder))]
        truth = model.engine.generate(prompts, seeds, asking.generate)
        assert [(ids, reason) for _, ids, reason in found] == [
            (response.token_ids, response.finish_reason) for response in truth
        ]
        made = {json.loads(rollout.sampling)["maker"] for rollout in to_rollouts(read_rollouts(asking.folder))}
        assert made == {f"{model.checkpoint.source} of a server that tells token ids"}
        # A unit whose record is gone is asked for again, and nothing else.
        folder = LocalFolder(tmp_path / "asked")
        [slot] = [slot for slot in committed_slots(folder) if slot[1] == 1]
        (folder.path / record_key(slot, 0)).unlink()
        for part in (folder.path / "rollouts").glob("*000001*"):
            part.unlink()
        server.requests.clear()
        assert sampled(job(model, tmp_path, "asked", engine="openai", endpoint=endpoint)) == found
        assert len(server.asked) == 2


def test_the_engine_is_identity_and_the_address_is_not(model: Model, tmp_path: Path) -> None:
    own = job(model, tmp_path, "a").manifest.identity["generate"]
    assert own == {"engine": "transformers", "max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 0}
    asked = job(model, tmp_path, "a", engine="openai", endpoint=SERVER).manifest.identity["generate"]
    assert asked == {**own, "engine": "openai"}
    named = job(model, tmp_path, "a", engine="openai", endpoint=replace(SERVER, model="x")).manifest.identity
    assert named["generate"] == {**asked, "served_model": "x"}
