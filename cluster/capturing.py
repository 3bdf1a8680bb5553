"""In a generator: activations captured while sampling, compared with a replay, and written with the rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personaspace.cluster.shards import ShardWriter, UnitShards
from personaspace.extract.checkpoint import Checkpoint
from personaspace.extract.collect import Expected
from personaspace.extract.generate.engine import InnerEngine
from personaspace.extract.packing import token_hash
from personaspace.extract.pooling import Pooled
from personaspace.extract.reductions import Readout
from personaspace.store.records import Agreement, Record
from personaspace.store.rollouts import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedUnit:
    """What was captured of a unit's rollouts."""

    means: Mapping[int, NDArray[np.float32]]
    """Row -> its means ``(Z, L, S, D)``, of those that are not dropped."""
    expected: Mapping[int, Expected]
    agreement: Mapping[int, Agreement]
    """Layer group -> how near one of its rollouts comes to a replay; empty if all are dropped."""


class Capturing:
    """Has an engine capture what ``writer`` writes."""

    def __init__(self, engine: InnerEngine, checkpoint: Checkpoint, writer: ShardWriter) -> None:
        self.engine, self._writer = engine, writer
        self._readout = Readout.of_arrays(writer.arrays)
        engine.capture(checkpoint, self._readout, writer.layers)

    def keep(
        self, rollouts: Sequence[Rollout], captured: Sequence[Pooled | None], replayed: Mapping[int, Pooled]
    ) -> CapturedUnit | None:
        """A unit's means; None unless those of every rollout are whole, so that a replay has to give them."""
        means: dict[int, NDArray[np.float32]] = {}
        expected: dict[int, Expected] = {}
        for rollout, pooled in zip(rollouts, captured, strict=True):
            if rollout.dropped is not None:
                continue
            counts = tuple(stop - start for start, stop in self._readout.segments(rollout.spans))
            if pooled is None or tuple(pooled.counts_S.tolist()) != counts:
                return None
            tokens = (*rollout.prompt_token_ids, *rollout.response_token_ids)
            expected[rollout.row] = Expected(token_hash=token_hash(tokens), counts=counts)
            means[rollout.row] = pooled.means_SD
        sampled = next((row for row in replayed if row in means), None)
        agreement = {} if sampled is None else self._compare(sampled, means[sampled], replayed[sampled].means_SD)
        return CapturedUnit(means=means, expected=expected, agreement=agreement)

    def commit(self, unit: int, shards: tuple[tuple[str, int], ...], kept: CapturedUnit, rollouts: Record) -> None:
        """Commit the unit's shards; ``rollouts`` is the record of what they are of."""
        self._writer.commit(
            UnitShards(
                unit=unit,
                shards=shards,
                dropped=rollouts.dropped,
                expected=kept.expected,
                source=rollouts.objects[0].sha256,
            ),
            kept.means,
            agreement=kept.agreement,
        )

    def _compare(
        self, row: int, ours_ZLSD: NDArray[np.float32], replayed_ZLSD: NDArray[np.float32]
    ) -> dict[int, Agreement]:
        ours, theirs = ours_ZLSD.astype(np.float64), replayed_ZLSD.astype(np.float64)
        norms = np.linalg.norm(theirs, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines = (ours * theirs).sum(-1) / (norms * np.linalg.norm(ours, axis=-1))
            relative = np.linalg.norm(ours - theirs, axis=-1) / norms
        layout, layers = self._writer.layout, np.array(self._writer.layers)
        groups = layers // layout.layer_group
        return {
            int(group): Agreement(
                row=row,
                cosine=float(cosines[:, groups == group].min()),
                relative=float(relative[:, groups == group].max()),
            )
            for group in np.unique(groups)
        }
