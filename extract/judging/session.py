"""One session of a judge: many requests at once, each answer kept once, within a budget."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from personaspace.extract.endpoint import EndpointError, same_model
from personaspace.extract.judging.answers import MalformedAnswerError, read_answer
from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.cost import Prices, Purse, most_tokens
from personaspace.extract.judging.endpoint import (
    FailedRequestError,
    Judge,
    RefusedRequestError,
    Reply,
)
from personaspace.extract.judging.instructions import Instructions
from personaspace.extract.judging.keeping import Keeper
from personaspace.extract.judging.pace import Pace, pause
from personaspace.extract.judging.progress import JudgingProgress
from personaspace.extract.judging.work import Task
from personaspace.store.errors import PersonaspaceError
from personaspace.store.judging import Answer, Spending
from personaspace.store.sessions import how_it_ended

KEEP_EVERY = 2.0
"""Seconds between two parts of answers: what a killed session has to ask again."""
REPORT_EVERY = 0.5
TELL_EVERY = 15.0
"""Seconds between two words for those who watch the run from elsewhere."""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """A rollout that got no score."""

    unit: int
    answer: Answer
    was_answered: bool
    """By the model that was asked, in words that hold no score."""


class JudgingSession:
    """Judges rollouts. ``load`` gives what is asked about some rows of a unit; ``prices`` None: nobody knows them."""

    def __init__(
        self,
        *,
        config: JudgeConfig,
        instructions: Instructions,
        judge: Judge,
        keeper: Keeper,
        prices: Prices | None,
        load: Callable[[int, Sequence[int]], Iterator[Task]],
        report: Callable[[JudgingProgress], None],
    ) -> None:
        self._config, self._instructions, self._judge = config, instructions, judge
        self._keeper, self._prices, self._load, self._report = keeper, prices, load, report
        self._pace = Pace(config.requests_per_minute)
        budget = None if config.budget is None else max(0.0, config.budget - keeper.spent_before)
        self._purse = Purse(budget, self._write_grant)
        self._models: Counter[str] = Counter()
        self._prompt_tokens = self._completion_tokens = 0
        self._left: dict[int, int] = {}
        """Unit -> rows that are still to be answered."""
        self._held: list[_Failure] = []
        """In a row, up to now. They count once a score shows that endpoint and model are good for something."""
        self._begin = time.monotonic()
        self._progress = JudgingProgress(rows=0, spent_before=keeper.spent_before)
        self._storage = ThreadPoolExecutor(1, "judge-storage")
        """One thread: what is kept is kept in order."""

    def run(self, missing: Mapping[int, Sequence[int]], *, done_before: int = 0) -> JudgingProgress:
        """Judge rows (unit -> rows, in order); returns how it went. ``done_before``: others that are wanted.

        Answers are kept as they come, so that an interruption loses those on their way only. Raises EndpointError where
        the endpoint is no good, StorageError and LeaseError as the store does.
        """
        self._left = {unit: len(rows) for unit, rows in missing.items() if rows}
        self._progress = replace(self._progress, rows=sum(self._left.values()), done_before=done_before)
        ended: BaseException | None = None
        try:
            asyncio.run(self._run(missing))
        except BaseException as error:
            ended = _first(error)
            raise ended from None
        finally:
            self._storage.shutdown()
            self._tell()
            # The last word is for people; what it can't be said of is in the store all the same.
            with suppress(PersonaspaceError):
                self._keeper.tell(self._progress.as_step(finished=ended is None), *how_it_ended(ended))
        return self._progress

    async def _run(self, missing: Mapping[int, Sequence[int]]) -> None:
        finished = False
        try:
            await self._judge_all(missing)
            self._settle_held()
            finished = True
        finally:
            # Also when interrupted. If something failed before, that is the error to tell.
            with suppress(*(() if finished else (PersonaspaceError,))):
                self._storage.submit(self._keeper.commit_all).result()
                self._storage.submit(self._keeper.flush, self._spending(ended=True)).result()
            await self._judge.close()

    async def _judge_all(self, missing: Mapping[int, Sequence[int]]) -> None:
        tasks: asyncio.Queue[tuple[int, Task] | None] = asyncio.Queue(2 * self._config.concurrency)
        async with asyncio.TaskGroup() as group:
            others = [group.create_task(self._produce(missing, tasks)), group.create_task(self._tick())]
            await asyncio.wait([group.create_task(self._work(tasks)) for _ in range(self._config.concurrency)])
            for other in others:
                other.cancel()

    async def _produce(
        self, missing: Mapping[int, Sequence[int]], tasks: asyncio.Queue[tuple[int, Task] | None]
    ) -> None:
        for unit, rows in missing.items():
            for task in await asyncio.to_thread(list, self._load(unit, rows)):
                await tasks.put((unit, task))
        for _ in range(self._config.concurrency):
            await tasks.put(None)

    async def _tick(self) -> None:
        """Keep what came in, now and then, and tell how far it is."""
        kept = time.monotonic()
        told = -math.inf
        while True:
            if time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                await self._stored(partial(self._keeper.tell, self._progress.as_step(), "running"))
            await asyncio.sleep(REPORT_EVERY)
            self._tell()
            if time.monotonic() - kept >= KEEP_EVERY:
                kept = time.monotonic()
                await self._stored(partial(self._keeper.flush, self._spending()))

    async def _work(self, tasks: asyncio.Queue[tuple[int, Task] | None]) -> None:
        while (found := await tasks.get()) is not None:
            unit, task = found
            failure: _Failure | None = None
            try:
                answer = await self._score(task)
            except MalformedAnswerError as error:
                reason = f"no score in {self._config.asks} answers; the last: {error}"
                failure = _Failure(unit=unit, answer=Answer(row=task.row, score=None, reason=reason), was_answered=True)
            except (FailedRequestError, RefusedRequestError) as error:
                answer = Answer(row=task.row, score=None, reason=str(error))
                failure = _Failure(unit=unit, answer=answer, was_answered=False)
            else:
                if answer is None:
                    return  # The budget has ended.
            if failure is None:
                assert answer is not None
                self._held, held = [], self._held
                for before in held:
                    await self._take(before.unit, before.answer)
                await self._take(unit, answer)
                continue
            self._held.append(failure)
            if len(self._held) >= self._config.stop_after:
                raise self._useless()

    async def _score(self, task: Task) -> Answer | None:
        """The judge's score of a rollout, asked again while it can't be read; None where the budget has ended."""
        prompt, failed = task.prompt, Exception()
        for _ in range(self._config.asks):
            reply = await self._ask(prompt.messages)
            if reply is None:
                return None
            asked = self._config.answers_as or self._config.model or ""
            if not same_model(asked, reply.model):
                self._count(unread=1)
                failed = FailedRequestError(f"the endpoint answered as {reply.model!r}, asked for {asked!r}")
                continue
            self._models[reply.model] += 1
            try:
                score, reason = read_answer(reply.text, prompt.scale, complete=reply.complete)
            except MalformedAnswerError as error:
                self._count(unread=1)
                prompt, failed = self._instructions.again(task.prompt, reply.text), error
                continue
            return Answer(row=task.row, score=score, reason=reason)
        raise failed

    async def _ask(self, messages: Sequence[Mapping[str, str]]) -> Reply | None:
        """One reply, however often the endpoint fails; None where the budget has ended."""
        prompt_tokens, config = most_tokens(messages), self._config
        most = self._prices.usd(prompt_tokens, config.max_tokens) if self._prices else 0.0
        for attempt in range(config.attempts):
            if not await self._purse.reserve(most, step=2 * config.concurrency * most):
                return None
            tokens = (0, 0)
            try:
                await self._pace.turn()
                self._count(requests=1)
                tokens = (prompt_tokens, config.max_tokens)  # Until it is known better, and if it is interrupted.
                reply = await self._judge.ask(messages)
                tokens = (
                    prompt_tokens if reply.prompt_tokens is None else reply.prompt_tokens,
                    config.max_tokens if reply.completion_tokens is None else reply.completion_tokens,
                )
                return reply
            except FailedRequestError as error:
                self._count(failed=1)
                failed = error
                tokens = tokens if error.may_cost else (0, 0)
            except (RefusedRequestError, EndpointError):
                tokens = (0, 0)
                raise
            finally:
                self._prompt_tokens += tokens[0]
                self._completion_tokens += tokens[1]
                self._purse.settle(most, self._prices.usd(*tokens) if self._prices else 0.0)
            if failed.wait is not None:
                self._pace.hold(failed.wait)
            if attempt + 1 < config.attempts:
                await asyncio.sleep(pause(attempt, config.first_pause, failed.wait))
        raise FailedRequestError(f"no answer in {config.attempts} attempts; the last: {failed}")

    async def _take(self, unit: int, answer: Answer) -> None:
        """Keep an answer, and the unit if it is complete."""
        self._storage.submit(self._keeper.take, answer)
        self._count(**{"unjudged" if answer.score is None else "scored": 1})
        self._left[unit] -= 1
        if not self._left[unit]:
            await self._stored(partial(self._keeper.commit, unit))

    def _settle_held(self) -> None:
        """Record the last failures, unless the endpoint was never good for anything."""
        if any(not failure.was_answered for failure in self._held) and not self._progress.scored:
            raise self._useless()
        for failure in self._held:
            self._storage.submit(self._keeper.take, failure.answer)
            self._count(unjudged=1)
        self._held = []

    def _useless(self) -> EndpointError:
        return EndpointError(
            f"judge {self._config.model}: {len(self._held)} rollouts in a row got no score. The last: "
            f"{self._held[-1].answer.reason}. These are not recorded; the same command asks again."
        )

    async def _write_grant(self, usd: float) -> None:
        await self._stored(partial(self._keeper.flush, replace(self._spending(), granted_usd=usd)))

    async def _stored(self, work: Callable[[], Outcome]) -> Outcome:
        return await asyncio.get_running_loop().run_in_executor(self._storage, work)

    def _spending(self, *, ended: bool = False) -> Spending:
        return Spending(
            requests=self._progress.requests,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            usd=self._purse.spent if self._prices else None,
            granted_usd=None if ended or self._config.budget is None else self._purse.granted,
            models=dict(self._models),
        )

    def _count(self, **more: int) -> None:
        counts = {name: getattr(self._progress, name) + number for name, number in more.items()}
        self._progress = replace(self._progress, **counts)

    def _tell(self) -> None:
        self._progress = replace(
            self._progress,
            spending=self._spending(),
            seconds=time.monotonic() - self._begin,
            is_over_budget=self._purse.is_empty,
        )
        self._report(self._progress)


def _first(error: BaseException) -> BaseException:
    """The first error of a group, however deep; or the error itself."""
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
