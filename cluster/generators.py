"""Ray actors that generate: one whole model each, publishing finished units themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import ray
import torch

from personaspace.cluster.faults import explain
from personaspace.extract.chat import ChatFormat
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.config import GenerateConfig, ModelConfig
from personaspace.extract.generate.noise import rollout_seed
from personaspace.extract.generate.transformers_engine import TransformersEngine
from personaspace.extract.personas import PlannedRollout
from personaspace.extract.rollouts import generated_rollout, imported_rollout
from personaspace.store.commit import commit
from personaspace.store.errors import IntegrityError
from personaspace.store.layout import rollouts_key
from personaspace.store.lease import Fence
from personaspace.store.records import ROLLOUTS
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


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationReport:
    """What a batch of units gave."""

    rows: int
    """Rows of the units that this batch committed."""
    dropped: Mapping[int, str]
    """Row -> reason."""
    tokens: int
    """Sampled tokens, of all rows of the batch."""


@ray.remote
class Generator:
    """Holds one model replica and turns units into committed rollouts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        config: GenerateConfig,
        fence: Fence,
        device: str,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self._checkpoint = checkpoint
        self._config = config
        self._fence = fence
        self._chat = ChatFormat(checkpoint, model)
        self._engine = TransformersEngine(checkpoint, self._chat, dtype=model.dtype, device=device)

    def generate(self, units: Sequence[UnitPlan]) -> GenerationReport:
        """Sample the batch and commit its units. Raises WorkerError naming the rollouts."""
        planned = [row for unit in units for row in unit.rows]
        with explain("generation", [row.rollout_id for row in planned]):
            prompts = [self._chat.encode_prompt(row.messages) for row in planned]
            seeds = [rollout_seed(self._config.seed, row.rollout_id) for row in planned]
            responses = self._engine.generate(prompts, seeds, self._config)
            made = iter(zip(prompts, responses, strict=True))
            rows = 0
            dropped: dict[int, str] = {}
            for unit in units:
                rollouts = [
                    generated_rollout(
                        row,
                        role,
                        *next(made),
                        chat=self._chat,
                        config=self._config,
                        max_positions=self._checkpoint.max_positions,
                    )
                    for row, role in zip(unit.rows, unit.roles, strict=True)
                ]
                if not unit.committed:
                    commit_rollouts(self._fence, unit, rollouts)
                    rows += len(rollouts)
                    dropped |= _dropped(rollouts)
        tokens = sum(len(response.token_ids) for response in responses)
        return GenerationReport(rows=rows, dropped=dropped, tokens=tokens)


def import_unit(fence: Fence, unit: UnitPlan, chat: ChatFormat, max_positions: int | None) -> GenerationReport:
    """Commit one unit of imported responses; no model is needed, so this runs in the driver."""
    rollouts = [
        imported_rollout(row, role, chat=chat, max_positions=max_positions)
        for row, role in zip(unit.rows, unit.roles, strict=True)
    ]
    commit_rollouts(fence, unit, rollouts)
    return GenerationReport(
        rows=len(rollouts),
        dropped=_dropped(rollouts),
        tokens=sum(len(rollout.response_token_ids) for rollout in rollouts),
    )


def commit_rollouts(fence: Fence, unit: UnitPlan, rollouts: Sequence[Rollout]) -> None:
    """Publish a unit's rollouts as one Parquet part. A valid part that is already there wins."""
    commit(
        fence,
        (ROLLOUTS, unit.unit, 0),
        {rollouts_key(unit.unit): encode_rollouts(rollouts)},
        rows=range(rollouts[0].row, rollouts[-1].row + 1),
        dropped=_dropped(rollouts),
        generation=unit.generation,
        inspect=partial(inspect_rollouts, {row.row: row.rollout_id for row in unit.rows}),
    )


def _dropped(rollouts: Sequence[Rollout]) -> dict[int, str]:
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
