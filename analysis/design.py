"""Which cells make which vectors, and how they are put together anew: permuted within questions, questions redrawn.

The questions are dealt into two halves, so that an axis is fitted by the one and roles are placed by the other.
Shape suffixes: R roles without default, V = R + 1 vectors, H = 2 V vectors of the two halves, Q questions, C cells, P
draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


@dataclass(frozen=True, kw_only=True)
class Design:
    """Cells of `default` and of every role, by question."""

    count_VQ: NDArray[np.int64]
    """Rollouts in each."""

    def weights(self) -> csr_array:
        """Weights ``(H, C)`` of the vectors of both halves."""
        return self._deal(self._own(1), np.ones((1, *self.count_VQ.shape)))

    def permuted(self, generator: np.random.Generator, draws: int, batch: int) -> Iterator[csr_array]:
        """Weights ``(P H, C)`` where the roles that answered a question have dealt their answers out anew.

        Draws come in batches of P = ``batch``, the last of the rest; so they do from ``resampled``.
        """
        present_RQ = self.count_VQ[1:] > 0
        # Among the roles that are there, the one with the n-th smallest key takes the answer of the n-th role.
        place_RQ = np.maximum(np.cumsum(present_RQ, axis=0) - 1, 0)
        for part in _batches(draws, batch):
            size = part.stop - part.start
            key_PRQ = np.where(present_RQ, generator.random((size, *present_RQ.shape)), 2.0)
            dealt_PRQ = 1 + np.take_along_axis(np.argsort(key_PRQ, axis=1), place_RQ[None], axis=1)
            taker_PVQ = self._own(size)
            taker_PVQ[:, 1:] = np.where(present_RQ, dealt_PRQ, taker_PVQ[:, 1:])
            yield self._deal(taker_PVQ, np.ones(taker_PVQ.shape))

    def resampled(self, generator: np.random.Generator, draws: int, batch: int) -> Iterator[csr_array]:
        """Weights ``(P H, C)`` where the questions of each half are drawn with replacement."""
        times_PQ = np.zeros((draws, self.count_VQ.shape[1]))
        for half in (half for half in self._halves if len(half)):
            drawn_PQ = generator.choice(half, size=(draws, len(half)))
            np.add.at(times_PQ, (np.arange(draws)[:, None], drawn_PQ), 1)
        for part in _batches(draws, batch):
            times_PVQ = np.repeat(times_PQ[part, None], len(self.count_VQ), axis=1)
            yield self._deal(self._own(len(times_PVQ)), times_PVQ)

    @cached_property
    def _halves(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Every other question that `default` and some role answered, and the rest."""
        asked = np.flatnonzero((self.count_VQ[0] > 0) & (self.count_VQ[1:] > 0).any(axis=0))
        other = np.setdiff1d(np.arange(self.count_VQ.shape[1]), asked)
        first, second = asked[0::2], asked[1::2]
        if len(second) < 2:
            return np.arange(self.count_VQ.shape[1]), np.empty(0, dtype=np.intp)
        # Questions that say nothing of the axis still belong to the roles' vectors.
        return np.sort(np.concatenate([first, other[0::2]])), np.sort(np.concatenate([second, other[1::2]]))

    def _own(self, draws: int) -> NDArray[np.intp]:
        """``(P, V, Q)``: every vector takes its own answers."""
        vectors, questions = self.count_VQ.shape
        return np.tile(np.arange(vectors)[:, None], (draws, 1, questions))

    def _deal(self, taker_PVQ: NDArray[np.intp], times_PVQ: NDArray[np.float64]) -> csr_array:
        """Weights ``(P H, C)``: the answers of cell (v, q), ``times_PVQ`` of each, go to vector ``taker_PVQ[v, q]``."""
        draws, vectors, questions = taker_PVQ.shape
        second_Q = np.zeros(questions, dtype=np.intp)
        second_Q[self._halves[1]] = vectors
        row_PVQ = taker_PVQ + second_Q + 2 * vectors * np.arange(draws)[:, None, None]
        used_PVQ = (self.count_VQ > 0) & (times_PVQ > 0)
        cell_PVQ = np.broadcast_to(np.arange(vectors * questions).reshape(vectors, questions), taker_PVQ.shape)
        shape = (2 * vectors * draws, vectors * questions)
        return csr_array((times_PVQ[used_PVQ], (row_PVQ[used_PVQ], cell_PVQ[used_PVQ])), shape=shape)


def _batches(draws: int, batch: int) -> Iterator[slice]:
    """The draws in batches."""
    for start in range(0, draws, batch):
        yield slice(start, min(start + batch, draws))
