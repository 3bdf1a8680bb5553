"""Windows and micro-batches: pure functions of plan and lengths, so that a resume repeats them exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Rollouts that go through the model together, right-padded to the longest."""

    rows: tuple[int, ...]
    """Rows of the run."""
    token_ids: tuple[tuple[int, ...], ...]
    """Prompt and response of each."""
    spans: tuple[tuple[int, int], ...]
    """Response tokens of each: ``[start, stop)``."""

    @property
    def padded_length(self) -> int:
        return max(len(ids) for ids in self.token_ids)

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(len(ids) for ids in self.token_ids)


def windows(unit_order: Sequence[int], unit_rows: int, window_rows: int) -> list[tuple[int, ...]]:
    """Cut the scheduled units into windows of about ``window_rows`` rollouts, at least one unit each."""
    size = max(1, round(window_rows / unit_rows))
    return [tuple(unit_order[start : start + size]) for start in range(0, len(unit_order), size)]


def batch_by_length(lengths: Mapping[int, int], token_budget: int) -> list[tuple[int, ...]]:
    """Group rows into micro-batches of at most ``token_budget`` padded tokens, longest first.

    A row longer than the budget gets a batch of its own. Ties are broken by row, so the result is unique.
    """
    batches: list[tuple[int, ...]] = []
    ordered = sorted(lengths, key=lambda row: (-lengths[row], row))
    while ordered:
        count = max(1, token_budget // max(1, lengths[ordered[0]]))
        batches.append(tuple(ordered[:count]))
        ordered = ordered[count:]
    return batches


def padding_waste(batches: Sequence[Sequence[int]], lengths: Mapping[int, int]) -> float:
    """Share of padded tokens that are padding."""
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / padded if padded else 0.0
