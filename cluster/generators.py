"""Ray actors that generate: an engine each, publishing finished units themselves."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import ray
import torch

from personaspace.cluster.capturing import CapturedUnit, Capturing
from personaspace.cluster.engines import GeneratorSpec, load_engine
from personaspace.cluster.events import Busy, Loaded
from personaspace.cluster.faults import explain
from personaspace.cluster.replicas import loaded
from personaspace.cluster.sharding import Member
from personaspace.extract.chat import ChatFormat
from personaspace.extract.config import GenerateConfig
from personaspace.extract.generate.auditor import choose_user
from personaspace.extract.generate.conversations import Talk, hold_conversations
from personaspace.extract.generate.engine import Captured, InnerEngine, Response
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.packing import DUMMY_TOKEN
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.pooling import Pooled
from personaspace.extract.rollouts import generated_rollout, held_rollout, imported_rollout, quarantined_rollout
from personaspace.store.commit import commit
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence
from personaspace.store.records import ROLLOUTS, Agreement, Record, describe
from personaspace.store.rollouts import Rollout, decode_rollouts, encode_rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitPlan:
    """One unit's rows to generate."""

    unit: int
    rows: tuple[PlannedRollout, ...]
    roles: tuple[str, ...]
    """Role id of each row."""
    committed: bool
    """It is there already; its rows only fill the batch, so that the others come out the same as before."""
    generation: int = 0
    """Of the record to write; above 0 in a repair."""
    shards: tuple[tuple[str, int], ...] = ()
    """(array's name in records, layer group) of what is captured and written with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Units to sample together, and what to do with them."""

    window: int
    units: tuple[UnitPlan, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Place in the batch -> why a dummy prompt is sampled instead."""
    trial: bool = False
    """Nothing is kept of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A batch was sampled."""

    tokens: int
    """Sampled tokens, of all rows of the batch."""
    busy: Busy


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A batch's units are committed."""

    rows: int
    """Rows of the units that this batch committed."""
    dropped: Mapping[int, str]
    """Row -> reason."""
    agreement: tuple[Agreement, ...]
    """Of the units that were captured: how near a sample of each comes to a replay, at its worst layers."""
    busy: Busy


@ray.remote(concurrency_groups={"store": 1})
class Generator(Member):
    """Holds an engine, or a rank's share of it, and turns units into committed rollouts."""

    def __init__(self, spec: GeneratorSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._chat = ChatFormat(spec.checkpoint, spec.model)
        self._sampled: dict[int, list[tuple[UnitPlan, list[Rollout], CapturedUnit | None]]] = {}
        """Window -> its units' rollouts and what was captured of them, until they are committed."""

    def load(self, meeting: str = "") -> Loaded:
        """Load the model, or find the server. ``meeting``: of a gang."""
        spec, begin = self._spec, time.monotonic()
        self._engine = load_engine(spec, self._chat, partial(self.join, meeting))
        # check_engine has seen to it that this engine can do what is asked of it here.
        if spec.hooks:
            cast(InnerEngine, self._engine).intervene(spec.checkpoint, spec.hooks)
        self._capturing: Capturing | None = None
        if spec.capture is not None:
            self._capturing = Capturing(cast(InnerEngine, self._engine), spec.checkpoint, spec.capture)
        positions = spec.checkpoint.max_positions
        self._user = choose_user(spec.auditor, self._engine, self._chat, spec.config, max_positions=positions)
        return loaded(begin)

    def generate(self, order: Order) -> Sampled:
        """Sample the batch, and keep its rollouts until they are committed. Raises WorkerError naming the rollouts."""
        planned = [row for unit in order.units for row in unit.rows]
        with explain("generation", [row.rollout_id for row in planned]):
            begin = time.time()
            prompts = [self._chat.encode_prompt(row.messages) for row in planned]
            for place in order.left_out:
                prompts[place] = [DUMMY_TOKEN] * len(prompts[place])
            seeds = [rollout_seed(self._spec.config.seed, row.noise_id) for row in planned]
            sampled = self._sample(prompts, seeds, self._spec.config)
            talks = self._talk_on(order, planned, sampled)
            for place, talk in talks.items():
                # What is stored of a conversation is its last turn, and all before is the prompt.
                prompts[place], sampled[place] = talk.conversation.prompt, (talk.response, talk.pooled)
            responses = [response for response, _ in sampled]
            replayed: dict[int, Pooled] = {}
            if self._capturing and not order.trial:
                # In a gang all ranks have to take part.
                places = _one_of_each(order.units, responses)
                replayed = self._capturing.engine.replay(
                    {planned[place].row: (prompts[place], responses[place]) for place in places}
                )
            if not order.trial and self._spec.rank == 0:
                self._keep(order, prompts, sampled, talks, replayed)
        tokens = sum(len(response.token_ids) for response in responses)
        tokens += sum(talk.earlier_tokens for talk in talks.values())
        return Sampled(tokens=tokens, busy=Busy(activity="generate", start=begin, stop=time.time()))

    def _sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], config: GenerateConfig) -> list[Captured]:
        if self._capturing is not None:
            return self._capturing.engine.generate_captured(prompts, seeds, config)
        return [(response, None) for response in self._engine.generate(prompts, seeds, config)]

    def _talk_on(
        self, order: Order, planned: Sequence[PlannedRollout], sampled: Sequence[tuple[Response, Pooled | None]]
    ) -> dict[int, Talk]:
        """Place in the batch -> what became of a conversation of several turns after its first response."""
        opened = {
            place: (row, *first)
            for place, (row, first) in enumerate(zip(planned, sampled, strict=True))
            if row.script is not None and place not in order.left_out
        }
        positions = self._spec.checkpoint.max_positions
        return hold_conversations(
            self._sample, self._chat, self._user, opened, self._spec.config, max_positions=positions
        )

    def _keep(
        self,
        order: Order,
        prompts: Sequence[list[int]],
        sampled: Sequence[tuple[Response, Pooled | None]],
        talks: Mapping[int, Talk],
        replayed: Mapping[int, Pooled],
    ) -> None:
        made = iter(enumerate(zip(prompts, sampled, strict=True)))
        kept = self._sampled[order.window] = []
        for unit in order.units:
            rollouts, captured = [], []
            for row, role in zip(unit.rows, unit.roles, strict=True):
                place, (prompt, (response, pooled)) = next(made)
                captured.append(pooled)
                if place in order.left_out:
                    reason = order.left_out[place]
                    rollouts.append(quarantined_rollout(row, role, chat=self._chat, reason=reason))
                    continue
                told: dict[str, Any] = {
                    "chat": self._chat,
                    "config": self._spec.config,
                    "max_positions": self._spec.checkpoint.max_positions,
                    "maker": self._engine.maker,
                }
                rollouts.append(
                    held_rollout(row, role, talks[place], auditor=self._spec.auditor, **told)
                    if place in talks
                    else generated_rollout(row, role, prompt, response, **told)
                )
            means = self._capturing.keep(rollouts, captured, replayed) if self._capturing else None
            kept.append((unit, rollouts, means))

    @ray.method(concurrency_group="store")
    def commit(self, window: int) -> Stored:
        """Publish and record the units of the window that are not there yet."""
        begin = time.time()
        rows = 0
        dropped: dict[int, str] = {}
        agreement: list[Agreement] = []
        for unit, rollouts, captured in self._sampled.pop(window):
            if unit.committed:
                continue
            record = commit_rollouts(self._spec.fence, unit, rollouts)
            # A part that was there already may hold other tokens, and a replay has to read those.
            own = record.objects[0].sha256 == describe(record.objects[0].key, encode_rollouts(rollouts)).sha256
            if self._capturing and captured and own:
                self._capturing.commit(unit.unit, unit.shards, captured, record)
                agreement += captured.agreement.values()
            rows += len(rollouts)
            dropped |= drops(rollouts)
        busy = Busy(activity="commit", start=begin, stop=time.time())
        return Stored(rows=rows, dropped=dropped, agreement=tuple(agreement), busy=busy)


def _one_of_each(units: Sequence[UnitPlan], responses: Sequence[Response]) -> list[int]:
    """Place in the batch of a row with a response, of each unit that is to be stored, where there is one."""
    places = []
    first = 0
    for unit in units:
        size = len(unit.rows)
        # Not the first of each: those have the same prompt and question.
        order = [first + (unit.unit + offset) % size for offset in range(size)]
        said = [place for place in order if responses[place].token_ids]
        places += said[:1] if unit.shards else []
        first += size
    return places


def import_unit(fence: Fence, unit: UnitPlan, chat: ChatFormat, max_positions: int | None) -> list[Rollout]:
    """Commit one unit of imported responses; no model is needed, so this runs in the driver."""
    rollouts = [
        imported_rollout(row, role, chat=chat, max_positions=max_positions)
        for row, role in zip(unit.rows, unit.roles, strict=True)
    ]
    commit_rollouts(fence, unit, rollouts)
    return rollouts


def commit_rollouts(fence: Fence, unit: UnitPlan, rollouts: Sequence[Rollout]) -> Record:
    """Publish a unit's rollouts as one Parquet part. A valid part that is already there wins."""
    return commit(
        fence,
        (ROLLOUTS, unit.unit, 0),
        {rollouts_key(unit.unit): encode_rollouts(rollouts)},
        rows=range(rollouts[0].row, rollouts[-1].row + 1),
        dropped=drops(rollouts),
        generation=unit.generation,
        inspect=partial(inspect_rollouts, {row.row: row.rollout_id for row in unit.rows}),
    )


def drops(rollouts: Sequence[Rollout]) -> dict[int, str]:
    """Row -> reason."""
    return {rollout.row: rollout.dropped for rollout in rollouts if rollout.dropped is not None}


def inspect_rollouts(ids: Mapping[int, str], data: bytes) -> dict[int, str]:
    """Dropped rows of a part found without a record. Raises IntegrityError if it isn't the part of these rows."""
    entries = decode_rollouts(data).select(["row", "rollout_id", "dropped"]).to_pylist()
    if {entry["row"]: entry["rollout_id"] for entry in entries} != ids:
        raise IntegrityError(f"{len(data)} bytes hold other rollouts than planned")
    return dropped_rows(entries)


def dropped_rows(columns: Sequence[dict[str, object]]) -> dict[int, str]:
    """Row -> reason, from the `row` and `dropped` columns of rollouts."""
    return {int(str(entry["row"])): str(entry["dropped"]) for entry in columns if entry["dropped"] is not None}
