"""Units, layer groups, shards and their keys: pure functions of the run's shape.

Rows (rollouts) are cut into units of R consecutive rows, layers into groups of G. The shard ``(unit, group)``
holds ``(R, G, hidden)`` values, its inner chunks ``(R, 1, hidden)``, and has exactly one writer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

ZARR_GROUP = "activations.zarr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Shape of a run's arrays. A run grows by segments; all else is fixed when it is created."""

    segments: tuple[int, ...]
    """Planned rollouts of each segment: the first plan, then what was added. Each begins a new unit."""
    layers: int
    """Blocks of the model; the layer axis always has this length."""
    hidden: int
    """Width of the residual stream."""
    unit_rows: int
    """R: rows per unit, chunk and shard."""
    layer_group: int
    """G: layers per shard."""

    @property
    def rows(self) -> int:
        """Planned rollouts, without the padding of each segment's last unit."""
        return sum(self.segments)

    @property
    def segment_units(self) -> list[range]:
        """Units of each segment."""
        ends = list(accumulate(math.ceil(rows / self.unit_rows) for rows in self.segments))
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def units(self) -> int:
        return self.segment_units[-1].stop if self.segments else 0

    @property
    def padded_rows(self) -> int:
        """Length of the rollout axis: whole units."""
        return self.units * self.unit_rows

    @property
    def groups(self) -> int:
        return math.ceil(self.layers / self.layer_group)

    def unit_slice(self, unit: int) -> slice:
        """Rows of the unit on the padded rollout axis."""
        return slice(unit * self.unit_rows, (unit + 1) * self.unit_rows)

    def unit_row_range(self, unit: int) -> range:
        """Planned rows of the unit: shorter than R for the last one of a segment, where padding follows."""
        for units, rows in zip(self.segment_units, self.segments, strict=True):
            if unit in units:
                first = units.start * self.unit_rows
                return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, first + rows))
        raise ValueError(f"unit {unit} of a run with {self.units} units")

    def planned_rows(self) -> Iterator[int]:
        """Rows of all rollouts, in order, without padding."""
        for units, rows in zip(self.segment_units, self.segments, strict=True):
            yield from range(units.start * self.unit_rows, units.start * self.unit_rows + rows)

    def group_layers(self, group: int) -> range:
        """Layers of the group."""
        return range(group * self.layer_group, min((group + 1) * self.layer_group, self.layers))

    def grow(self, rows: int) -> "Layout":
        """The layout with one more segment of ``rows`` rollouts."""
        return replace(self, segments=(*self.segments, rows))

    def of_spans(self, capacity: int) -> "Layout":
        """Layout of arrays with ``capacity`` places for spans for each row of the rollout axis."""
        spans = tuple(len(units) * self.unit_rows * capacity for units in self.segment_units)
        return replace(self, segments=spans, unit_rows=self.unit_rows * capacity)

    def stage_boundaries(self, stages: int, groups: int | None = None) -> list[int]:
        """Split the layers of the first ``groups`` groups (default: all) over ``stages``: ``[0, ..., stop]``.

        Cuts are multiples of G, as even as groups allow. Raises ValueError when there are more stages than groups.
        """
        groups = groups or self.groups
        if not 1 <= stages <= groups:
            raise ValueError(f"stages must be 1 to {groups} (layer groups of {self.layer_group}), not {stages}")
        cuts = [round(stage * groups / stages) * self.layer_group for stage in range(stages)]
        return [*cuts, self.group_layers(groups - 1).stop]


def shard_key(array: str, unit: int, group: int) -> str:
    """Key of a shard of ``array``, its path in the group, inside the run folder (Zarr v3 default chunk keys)."""
    return f"{ZARR_GROUP}/{array}/c/{unit}/{group}/0"


def coordinate_key(name: str, unit: int) -> str:
    """Key of one unit's chunk of a 1-D coordinate."""
    return f"{ZARR_GROUP}/{name}/c/{unit}"


def rollouts_key(unit: int) -> str:
    """Key of the Parquet part that holds one unit's rollouts."""
    return f"rollouts/{unit:06d}.parquet"


def choose_unit_rows(role_rows: Sequence[int], target: int = 128) -> int:
    """R for roles with these row counts: their largest common divisor up to ``target``, so that no unit mixes roles.

    Where the common divisor is too small to make useful chunks (below 8), units mix neighbouring roles instead.
    """
    common = math.gcd(*role_rows)
    best = max(d for d in range(1, min(common, target) + 1) if common % d == 0)
    return best if best >= 8 else min(64, sum(role_rows))


def choose_layer_group(layers: int) -> int:
    """G for a model: the largest divisor up to 10 that leaves at least six groups, or an eighth of the layers."""
    divisors = [g for g in range(1, 11) if layers % g == 0 and layers // g >= 6]
    fallback = math.ceil(layers / 8)
    return max([*divisors, 1]) if max([*divisors, 0]) >= min(4, fallback) else fallback


def interleave(first_role_of_unit: Sequence[int]) -> list[int]:
    """Order in which units are worked on: the first unit of every role, then the second of every role, and so on.

    A run stopped half-way then holds some rollouts of every role.
    """
    seen: dict[int, int] = {}
    ranks = []
    for role in first_role_of_unit:
        ranks.append(seen.get(role, 0))
        seen[role] = ranks[-1] + 1
    return sorted(range(len(ranks)), key=lambda unit: (ranks[unit], unit))


def ranges(layers: Sequence[int]) -> str:
    """Layers for people, such as `0 to 4, 10 to 14`."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(f"{start} to {end}" for start, end in zip(starts, ends, strict=True))
