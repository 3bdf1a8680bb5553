"""A judge that is a local model: actors on the run's own cluster, with the engine that generates rollouts."""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
import torch
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from personaspace.cluster.config import ClusterConfig
from personaspace.cluster.precision import choose_dtype
from personaspace.cluster.replicas import alive_nodes
from personaspace.cluster.room import room
from personaspace.cluster.session import ray_cluster, share_cluster
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint, resolve
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.endpoint import EndpointError
from personaspace.extract.generate.transformers_engine import TransformersEngine, load_causal_lm
from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.endpoint import FailedRequestError, RefusedRequestError, Reply
from personaspace.store.errors import InputError

GATHER = 0.05
"""Seconds that a batch waits for more questions."""
RESTARTS = 3
"""Times that Ray starts an actor anew."""
RESTART_PAUSE = 0.5
"""Seconds between two looks at an actor that is starting anew."""
GREEDY = 1e-6
"""Nucleus that holds the most probable token only."""

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Said:
    """What an actor made of one question."""

    text: str
    complete: bool
    prompt_tokens: int
    completion_tokens: int
    refused: str = ""
    """Why it can't be asked."""


@ray.remote(max_restarts=RESTARTS)
class Answerer:
    """Holds a whole model, and answers conversations in batches."""

    def __init__(self, checkpoint: Checkpoint, model: ModelConfig, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._limit = checkpoint.max_positions
        self._chat = ChatFormat(checkpoint, model)
        loaded = load_causal_lm(checkpoint, dtype=model.settled_dtype, device=device)
        self._engine = TransformersEngine(loaded, self._chat, device=device)

    def answer(self, conversations: Sequence[Messages], config: GenerateConfig) -> list[_Said]:
        """One answer to each conversation."""
        prompts = [self._chat.encode_prompt([dict(message) for message in messages]) for messages in conversations]
        fitting = [
            place
            for place, prompt in enumerate(prompts)
            if self._limit is None or len(prompt) + config.max_new_tokens <= self._limit
        ]
        said = [
            _Said(
                text="",
                complete=False,
                prompt_tokens=0,
                completion_tokens=0,
                refused=f"{len(prompt)} tokens of prompt and an answer exceed the judge's context of {self._limit}",
            )
            for prompt in prompts
        ]
        if fitting:
            seeds = [_seed(conversations[place]) for place in fitting]
            responses = self._engine.generate([prompts[place] for place in fitting], seeds, config)
            for place, response in zip(fitting, responses, strict=True):
                said[place] = _Said(
                    text=response.text,
                    complete=response.finish_reason == "stop",
                    prompt_tokens=len(prompts[place]),
                    completion_tokens=len(response.token_ids),
                )
        return said


class LocalJudge:
    """Hands questions to actors, in batches."""

    def __init__(self, actors: Sequence[Any], config: JudgeConfig, cluster: ClusterConfig) -> None:
        self._actors, self._model, self._stall = actors, config.model or "", cluster.start_timeout
        self._batch = max(1, config.concurrency // len(actors))
        self._sampling = GenerateConfig(
            max_new_tokens=config.max_tokens,
            temperature=config.temperature or 1.0,
            top_p=1.0 if config.temperature else GREEDY,
        )
        self._questions: asyncio.Queue[tuple[Messages, asyncio.Future[_Said]]] | None = None
        self._loops: list[asyncio.Task[None]] = []

    async def ask(self, messages: Messages) -> Reply:
        """One answer to the messages."""
        if self._questions is None:
            self._questions = asyncio.Queue()
            self._loops = [asyncio.create_task(self._serve(actor, self._questions)) for actor in self._actors]
        answer: asyncio.Future[_Said] = asyncio.get_running_loop().create_future()
        await self._questions.put((messages, answer))
        said = await answer
        if said.refused:
            raise RefusedRequestError(said.refused)
        return Reply(
            text=said.text,
            complete=said.complete,
            model=self._model,
            prompt_tokens=said.prompt_tokens,
            completion_tokens=said.completion_tokens,
        )

    async def close(self) -> None:
        """Stop handing out questions."""
        for loop in self._loops:
            loop.cancel()

    async def _serve(self, actor: Any, questions: asyncio.Queue[tuple[Messages, asyncio.Future[_Said]]]) -> None:
        while True:
            batch = [await questions.get()]
            await asyncio.sleep(GATHER)
            while len(batch) < self._batch and not questions.empty():
                batch.append(questions.get_nowait())
            error: Exception | None = None
            answers: list[_Said] = []
            try:
                async with asyncio.timeout(self._stall):
                    answers = await actor.answer.remote([messages for messages, _ in batch], self._sampling)
            except TimeoutError:
                ray.kill(actor, no_restart=False)
                error = FailedRequestError(f"the judge's actor gave no answer within {self._stall:g} s")
            except RayActorError as death:
                # Ray starts it anew; while it loads, its next batch waits.
                gone = f"the judge's actor died: {_line(death)}"
                error = EndpointError(gone) if await self._is_gone(actor) else FailedRequestError(gone)
            except RayError as failure:
                error = EndpointError(f"judge {self._model}: {_line(failure)}")
            for place, (_, answer) in enumerate(batch):
                if answer.done():
                    continue  # Whoever asked was interrupted.
                if error is None:
                    answer.set_result(answers[place])
                else:
                    answer.set_exception(error)

    async def _is_gone(self, actor: Any) -> bool:
        """Whether Ray has given the actor up; otherwise it is ready again."""
        while True:
            try:
                await actor.answer.remote([], self._sampling)
            except ActorUnavailableError:
                await asyncio.sleep(RESTART_PAUSE)
            except RayActorError:
                return True
            else:
                return False


@contextmanager
def local_judge(config: JudgeConfig, cluster: ClusterConfig) -> Iterator[LocalJudge]:
    """A local model that judges: as many actors as ``cluster`` asks for or has room for, each with the whole model.

    Raises InputError for a model that does not exist.
    """
    # A judge gives a number in few words; a model that thinks first would be cut off.
    model = ModelConfig(id=config.model or "", thinking=False)
    checkpoint = resolve(model, hashed=False)
    with ray_cluster(cluster):
        nodes = alive_nodes()
        workers = share_cluster(cluster, nodes, 1)
        fitting = room(nodes, workers, 1)
        count = min(fitting, cluster.replicas or fitting)
        if not count:
            raise InputError("cluster: no node has room for a judge.")
        model = replace(model, dtype=choose_dtype(workers.device, cluster)[0])
        make = cast(Any, Answerer).options(num_cpus=workers.cpus, num_gpus=workers.gpus)
        actors = [make.remote(checkpoint, model, workers.device, workers.threads) for _ in range(count)]
        yield LocalJudge(actors, config, cluster)


def _seed(messages: Messages) -> int:
    """63 bits, of the conversation alone."""
    content = json.dumps([dict(message) for message in messages], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") >> 1


def _line(error: Exception) -> str:
    """The last line of an error that came through Ray, which is the worker's own."""
    return str(error).strip().rsplit("\n", 1)[-1]
