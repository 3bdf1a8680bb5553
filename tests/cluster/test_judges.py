"""A local model that judges: real actors on real Ray."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.judges import GATHER, GREEDY, LocalJudge, local_judge
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.endpoint import FailedRequestError, RefusedRequestError, Reply
from personaspace.extract.precision import machine_dtype
from personaspace.judging import JudgeOptions, judge_run
from personaspace.run import carry_out
from personaspace.store import open_run
from personaspace.store.errors import InputError
from personaspace.store.scores import read_judgements
from tests.cluster.small_jobs import config_for, make_place, talk
from tests.extract.judging.chat_server import ChatServer, expected_score
from tests.extract.judging.runs import KEY, make_run, settings
from tests.models import tiny_checkpoint

CLUSTER = ClusterConfig(device="cpu", replicas=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("judge") / "model")


def test_actors_answer_as_the_engine_does(model: Path) -> None:
    talks = [[{"role": "user", "content": f"What is {number}?"}] for number in range(5)]
    config = JudgeConfig(model=str(model), engine="local", max_tokens=6, concurrency=4)

    async def ask(judge: LocalJudge) -> list[Reply]:
        replies = await asyncio.gather(*(judge.ask(talk) for talk in talks))
        with pytest.raises(RefusedRequestError, match=r"\d+ tokens of prompt and an answer exceed the judge's context"):
            await judge.ask([{"role": "user", "content": "word " * 5000}])
        await judge.close()
        return replies

    with local_judge(config, CLUSTER) as judge:
        replies = asyncio.run(ask(judge))
    checkpoint, settings = resolve(ModelConfig(id=str(model))), ModelConfig(id=str(model), thinking=False)
    chat = ChatFormat(checkpoint, settings)
    engine = TransformersEngine(load_causal_lm(checkpoint, dtype=machine_dtype("cpu")), chat)
    sampling = GenerateConfig(max_new_tokens=6, temperature=1.0, top_p=GREEDY)
    prompts = [chat.encode_prompt(talk) for talk in talks]
    alone = engine.generate(prompts[:1], [7], sampling)
    assert replies[0].text == alone[0].text
    assert [reply.prompt_tokens for reply in replies] == [len(prompt) for prompt in prompts]
    assert {reply.model for reply in replies} == {str(model)}


def test_a_model_that_can_not_judge_leaves_a_reason_for_every_rollout(model: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=16)
    short = tmp_path / "judge.yaml"  # The tiny model's context is short.
    texts = {"system": "", "role": "{role} {question} {answer}", "trait": "{description} {question} {answer}"}
    short.write_text(yaml.safe_dump({"version": 1, **texts, "form": "0 to 3?", "reminder": "0 to 3?"}))
    config = JudgeConfig(
        model=str(model),
        engine="local",
        instructions=str(short),
        max_tokens=8,
        asks=2,
        name="tiny",
        concurrency=8,
    )
    judge_run(folder, config, JudgeOptions(), cluster=CLUSTER)
    unjudged = {row: why for unit in read_judgements(folder, "tiny").values() for row, why in unit.unjudged.items()}
    assert unjudged.keys() == set(range(4, 16))
    assert all(why.startswith("no score in 2 answers; the last: ") for why in unjudged.values())


def test_a_run_is_judged_between_its_other_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    talks = {role: [talk(f"Why {number}?", f"Answer {number}") for number in range(4)] for role in ("default", "ghost")}
    place = make_place(tmp_path, talks)
    config = config_for(place / "model", place / "responses", place, "run")
    with ChatServer() as server:
        judged = replace(config, judge=settings(server, budget=1))
        carry_out(judged, ["generate", "judge"])
        assert server.rows_asked == dict.fromkeys(range(4), 1)  # Of the ghost; the server goes by the texts.
    scores = open_run(place / "run")["score"].values
    assert np.isnan(scores[:4]).all()
    assert scores[4:].tolist() == [expected_score(number) for number in range(4)]
    monkeypatch.delenv("OPENAI_API_KEY")
    far = replace(config, judge=JudgeConfig(model="m", base_url="https://judge.invalid/v1"))
    with pytest.raises(InputError, match=r"the environment variable OPENAI_API_KEY is not set"):
        carry_out(far, ["generate", "judge"])


@pytest.mark.nightly
def test_an_actor_that_dies_is_started_anew(model: Path) -> None:
    config = JudgeConfig(model=str(model), engine="local", max_tokens=4, concurrency=4)
    talks = [[{"role": "user", "content": f"What is {number}?"}] for number in range(12)]

    async def ask(judge: LocalJudge, actor: Any) -> tuple[list[Reply | BaseException], Reply]:
        await judge.ask(talks[0])
        asked = [asyncio.create_task(judge.ask(talk)) for talk in talks]
        await asyncio.sleep(GATHER)
        ray.kill(actor, no_restart=False)
        replies = await asyncio.gather(*asked, return_exceptions=True)
        again = await judge.ask(talks[0])
        await judge.close()
        return replies, again

    with local_judge(config, CLUSTER) as judge:
        replies, again = asyncio.run(ask(judge, judge._actors[0]))
    failed = [reply for reply in replies if not isinstance(reply, Reply)]
    assert failed
    assert all(isinstance(error, FailedRequestError) for error in failed), failed
    assert "the judge's actor died" in str(failed[0])
    assert again.prompt_tokens
