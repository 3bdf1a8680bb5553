"""Windows and micro-batches: pure functions of plan and lengths, so that a resume repeats them exactly."""

import hashlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaspace.extract.config import Attention, Packing

Segment = tuple[int, int]
"""Tokens ``[start, stop)`` of one rollout whose states are summed."""
DUMMY_TOKEN = 0
"""Fills the place of a rollout that may not be run."""
WASTE = 0.03
"""Share of the token budget that a further micro-batch must save in padding to be worth it."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rollouts that go through the model together: right-padded to the longest, or packed one after another."""

    rows: tuple[int, ...]
    """Rows of the run."""
    token_ids: tuple[tuple[int, ...], ...]
    """Prompt and response of each."""
    segments: tuple[tuple[Segment, ...], ...]
    """Of each: the tokens that are summed, for each of its sums."""
    packed: bool = False
    """All rollouts lie in one sequence, and don't see each other."""
    begins: tuple[int, ...] = ()
    """Of each: where its response begins. Empty where nothing depends on it."""

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(ids) for ids in self.token_ids)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Batch and token dimension of the tensors."""
        return (1, self.tokens) if self.packed else (len(self.rows), max(self.lengths))

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    @cached_property
    def origins(self) -> tuple[tuple[int, int], ...]:
        """Where each rollout's first token lies in the tensors: (batch, token)."""
        if self.packed:
            return tuple((0, start) for start in accumulate((0, *self.lengths[:-1])))
        return tuple((row, 0) for row in range(len(self.rows)))

    @cached_property
    def placed_segments(self) -> tuple[tuple[int, int, int], ...]:
        """All segments as they lie in the tensors, rollout by rollout: (batch, start, stop)."""
        return tuple(
            (batch, origin + start, origin + stop)
            for (batch, origin), segments in zip(self.origins, self.segments, strict=True)
            for start, stop in segments
        )

    def blank(self, places: Collection[int]) -> "MicroBatch":
        """The same with dummies of the same lengths in these places: all shapes and other rollouts stay as they are."""
        return replace(
            self,
            token_ids=tuple(
                (DUMMY_TOKEN,) * len(ids) if place in places else ids for place, ids in enumerate(self.token_ids)
            ),
        )

    @cached_property
    def flat_ids(self) -> NDArray[np.int32]:
        """All token ids, rollout by rollout."""
        return np.fromiter(chain.from_iterable(self.token_ids), dtype=np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        # As one array, made once: thousands of Python integers would take 0.1 ms for every stage of every micro-batch.
        return _unpack, (self.rows, self.lengths, self.flat_ids, self.segments, self.packed, self.begins)

    def part(self, first: int, stop: int) -> "MicroBatch":
        """Its rollouts number ``first`` to ``stop - 1``."""
        return replace(
            self,
            rows=self.rows[first:stop],
            token_ids=self.token_ids[first:stop],
            segments=self.segments[first:stop],
            begins=self.begins[first:stop],
        )


def _unpack(
    rows: tuple[int, ...],
    lengths: tuple[int, ...],
    ids: NDArray[np.int32],
    segments: tuple[tuple[Segment, ...], ...],
    packed: bool,
    begins: tuple[int, ...],
) -> MicroBatch:
    pieces = np.split(ids, list(accumulate(lengths))[:-1])
    token_ids = tuple(tuple(piece.tolist()) for piece in pieces)
    return MicroBatch(rows=rows, token_ids=token_ids, segments=segments, packed=packed, begins=begins)


def chooses_packed(packing: Packing, attention: Attention) -> bool:
    """How micro-batches are formed. Flash attention takes packed rollouts as they are; others waste time on masks."""
    return packing == "packed" or (packing == "auto" and attention.startswith("flash"))


def token_hash(token_ids: Sequence[int]) -> str:
    """Of one rollout's tokens: the same in every process, whatever lies between reading and running them."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()


def windows(unit_order: Sequence[int], unit_rows: int, window_rows: int) -> list[tuple[int, ...]]:
    """Cut the scheduled units into windows of about ``window_rows`` rollouts, at least one unit each."""
    size = max(1, round(window_rows / unit_rows))
    return [tuple(unit_order[start : start + size]) for start in range(0, len(unit_order), size)]


def form_batches(
    tokens: Mapping[int, tuple[int, ...]],
    segments: Mapping[int, tuple[Segment, ...]],
    token_budget: int,
    *,
    packed: bool,
    begins: Mapping[int, int] | None = None,
) -> list[MicroBatch]:
    """Micro-batches of rollouts, given by row: their token ids, what is summed of each, where its response begins."""
    lengths = {row: len(ids) for row, ids in tokens.items()}
    return [
        MicroBatch(
            rows=rows,
            token_ids=tuple(tokens[row] for row in rows),
            segments=tuple(segments[row] for row in rows),
            packed=packed,
            begins=() if begins is None else tuple(begins[row] for row in rows),
        )
        for rows in (pack_by_length if packed else batch_by_length)(lengths, token_budget)
    ]


def batch_by_length(lengths: Mapping[int, int], token_budget: int) -> list[tuple[int, ...]]:
    """Group rows into padded micro-batches of at most ``token_budget`` tokens, longest first.

    Rows are sorted by length and cut where padding and the number of micro-batches together cost least; a further
    micro-batch counts as much as 3% of the budget in padding. A row longer than the budget gets a batch of its own.
    Ties are broken by row, so the result is unique.
    """
    ordered = sorted(lengths, key=lambda row: (-lengths[row], row))
    overhead = WASTE * token_budget
    # cost[n]: of the best cut of the first n rows; cuts[n]: where its last batch begins.
    cost, cuts = [0.0], [0]
    for stop in range(1, len(ordered) + 1):
        best, cut = float("inf"), stop - 1
        for start in range(stop - 1, -1, -1):
            padded = (stop - start) * lengths[ordered[start]]
            if padded > token_budget and start < stop - 1:
                break
            if cost[start] + padded + overhead < best:
                best, cut = cost[start] + padded + overhead, start
        cost.append(best)
        cuts.append(cut)
    batches: list[tuple[int, ...]] = []
    stop = len(ordered)
    while stop:
        batches.append(tuple(ordered[cuts[stop] : stop]))
        stop = cuts[stop]
    return batches[::-1]


def pack_by_length(lengths: Mapping[int, int], token_budget: int) -> list[tuple[int, ...]]:
    """Group rows into packed micro-batches of at most ``token_budget`` tokens, longest first: no padding at all."""
    batches: list[list[int]] = []
    free = 0
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        if not batches or lengths[row] > free:
            batches.append([])
            free = token_budget
        batches[-1].append(row)
        free -= lengths[row]
    return [tuple(batch) for batch in batches]


def padding_waste(batches: Sequence[MicroBatch]) -> float:
    """Share of the tokens that the model runs which are padding."""
    ran = sum(rows * length for rows, length in (batch.shape for batch in batches))
    return 1 - sum(batch.tokens for batch in batches) / ran if ran else 0.0
