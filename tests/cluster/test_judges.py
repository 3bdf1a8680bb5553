"""A local model that judges: real actors on real Ray."""

import asyncio
from pathlib import Path

import pytest

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.judges import GREEDY, LocalJudge, local_judge
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import resolve
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.endpoint import RefusedRequestError, Reply
from personaspace.judging import JudgeOptions, judge_run
from personaspace.store.scores import read_judgements
from tests.extract.judging.runs import make_run
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
    engine = TransformersEngine(load_causal_lm(checkpoint, dtype="bfloat16"), chat)
    sampling = GenerateConfig(max_new_tokens=6, temperature=1.0, top_p=GREEDY)
    prompts = [chat.encode_prompt(talk) for talk in talks]
    alone = engine.generate(prompts[:1], [7], sampling)
    assert replies[0].text == alone[0].text
    assert [reply.prompt_tokens for reply in replies] == [len(prompt) for prompt in prompts]
    assert {reply.model for reply in replies} == {str(model)}


def test_a_model_that_can_not_judge_leaves_a_reason_for_every_rollout(model: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=16)
    config = JudgeConfig(model=str(model), engine="local", max_tokens=8, asks=2, name="tiny", concurrency=8)
    judge_run(folder, config, JudgeOptions(), cluster=CLUSTER)
    unjudged = {row: why for unit in read_judgements(folder, "tiny").values() for row, why in unit.unjudged.items()}
    assert unjudged.keys() == set(range(4, 16))
    assert all(why.startswith("no score in 2 answers; the last: ") for why in unjudged.values())
