"""Writing shards: what workers do with the means that they have of a unit's rollouts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from personaspace.extract.collect import Expected, inspect_shard_values, shard_values
from personaspace.extract.reductions import Readout
from personaspace.store.commit import commit
from personaspace.store.config import Precision
from personaspace.store.layout import Layout, shard_key
from personaspace.store.lease import Fence
from personaspace.store.records import Agreement
from personaspace.store.schema import ArraySpec, decode_shard, encode_shard


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitShards:
    """Shards of one unit that a worker has to commit."""

    unit: int
    shards: tuple[tuple[str, int], ...]
    """(array's name in records, layer group) of the worker's shards without a record."""
    dropped: Mapping[int, str]
    """Rows that were dropped before they were read, with reasons."""
    expected: Mapping[int, Expected]
    """What every other row was read from."""
    source: str
    """SHA-256 of the rollouts that they are of."""
    redo: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Shard -> generation of the record to write, where it is not 0: in a repair."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWriter:
    """Checks, encodes, publishes and records shards."""

    fence: Fence
    layout: Layout
    arrays: tuple[ArraySpec, ...]
    """Arrays that are read."""
    layers: tuple[int, ...]
    """Layers that are read."""
    spans_per_rollout: int
    precision: Precision

    def commit(
        self,
        unit: UnitShards,
        means: Mapping[int, NDArray[np.float32] | str],
        *,
        split: Collection[int] = (),
        agreement: Mapping[int, Agreement] | None = None,
    ) -> None:
        """Commit a unit's shards, given each row's means ``(Z, L, S, D)``, or why it has none.

        ``split``: rows that ran in parts. ``agreement``: layer group -> how near its sample came to a replay, where
        they were captured.
        """
        layout, readout = self.layout, Readout.of_arrays(self.arrays)
        places = {place.spec.record: place for place in readout.places(self.arrays)}
        rows = layout.unit_row_range(unit.unit)
        used = {row: len(e.counts) - len(readout.reductions) for row, e in unit.expected.items()}
        for array, group in unit.shards:
            place = places[array]
            capacity = self.spans_per_rollout if place.spec.spans else 1
            own = layout.of_spans(capacity) if place.spec.spans else layout
            layers = layout.group_layers(group)
            first = self.layers.index(layers.start)
            values, dropped = shard_values(
                means,
                place,
                slice(first, first + len(layers)),
                first_row=rows.start,
                shape=(own.unit_rows, len(layers), own.hidden),
                capacity=capacity,
            )
            commit(
                self.fence,
                (array, unit.unit, group),
                {shard_key(place.spec.path, unit.unit, group): encode_shard(values, own, self.precision)},
                rows=rows,
                dropped={**unit.dropped, **dropped},
                source=unit.source,
                split=tuple(sorted(set(split) & set(rows))),
                agreement=None if agreement is None else agreement.get(group),
                generation=unit.redo.get((array, group), 0),
                inspect=partial(
                    inspect_shard, layout, place.spec, self.spans_per_rollout, unit.unit, group, unit.dropped, used
                ),
            )


def inspect_shard(
    layout: Layout,
    spec: ArraySpec,
    spans_per_rollout: int,
    unit: int,
    group: int,
    dropped: Mapping[int, str],
    used: Mapping[int, int],
    data: bytes,
) -> dict[int, str]:
    """Dropped rows of a shard found without a record. Raises IntegrityError if it is not this unit's, whole.

    ``used``: how many spans each rollout has, for an array of spans.
    """
    capacity = spans_per_rollout if spec.spans else 1
    own = layout.of_spans(capacity) if spec.spans else layout
    return inspect_shard_values(
        decode_shard(data, own, len(layout.group_layers(group))),
        first_row=layout.unit_slice(unit).start,
        known_dropped=dropped,
        planned=layout.unit_row_range(unit),
        used=used if spec.spans else None,
        capacity=capacity,
    )
