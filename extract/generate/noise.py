"""Sampling that depends on the rollout alone: per-row Gumbel noise, keyed by seed, step and token.

Adding Gumbel noise to the logits and taking the argmax draws from the softmax (Gumbel-max). The noise of a
candidate is a hash of (row seed, step, token id): no generator state, the same on every device, and untouched
by which other rows are in the batch. Promise: in float32 a rollout's text is the same whatever its batch. In
bfloat16 the logits themselves move with the batch's shape, so there it holds for equal batches only.
Shape suffixes: B rows, V vocabulary, K candidates.
"""

import hashlib

import torch
from transformers import LogitsProcessor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def rollout_seed(seed: int, rollout_id: str) -> int:
    """Seed of one rollout: 63 bits of a hash of the run's seed and the rollout's id."""
    digest = hashlib.sha256(f"{seed}/{rollout_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gumbel(seed_B: torch.Tensor, step_B: torch.Tensor, token_BK: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise ``(B, K)`` float32 for candidate tokens, from SplitMix64 over (seed, step, token)."""
    state_BK = _splitmix((seed_B + _signed(_GOLDEN) * (step_B + 1))[:, None])
    state_BK = _splitmix(state_BK + _signed(_GOLDEN) * (token_BK + 1))
    uniform_BK = (_shift(state_BK, 11).double() + 0.5) * 2.0**-53
    return (-(-uniform_BK.log()).log()).float()


class GumbelTopP(LogitsProcessor):
    """Temperature, nucleus and Gumbel noise in one step: greedy decoding of its output samples.

    The nucleus is the smallest set of most probable tokens that holds ``top_p``, with all tokens tied at its
    edge (bfloat16 logits tie often), so that it does not hang on the order in which ties are sorted.
    """

    def __init__(self, seeds: list[int], *, temperature: float, top_p: float, prompt_length: int) -> None:
        self._seeds = torch.tensor(seeds, dtype=torch.int64)
        self._temperature = temperature
        self._top_p = top_p
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, V)`` whose argmax is the sampled token."""
        seed_B = self._seeds.to(scores.device)
        step_B = torch.full_like(seed_B, input_ids.shape[1] - self._prompt_length)
        return noisy(scores, seed_B, step_B, temperature=self._temperature, top_p=self._top_p)


def noisy(
    logits_BV: torch.Tensor, seed_B: torch.Tensor, step_B: torch.Tensor, *, temperature: float, top_p: float
) -> torch.Tensor:
    """Scores ``(B, V)`` whose argmax is each row's sampled token number ``step_B``."""
    logits_BV = logits_BV.float() / temperature
    logit_BK, token_BK = nucleus(logits_BV, top_p)
    noise_BK = gumbel(seed_B, step_B, token_BK)
    return torch.full_like(logits_BV, -torch.inf).scatter_(1, token_BK, logit_BK + noise_BK)


def nucleus(logits_BV: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids ``(B, K)`` of the most probable tokens; those outside the nucleus have logit -inf.

    Looks at the top 256 first and widens until every row's nucleus lies inside: exact, without sorting the
    vocabulary at each step.
    """
    vocabulary = logits_BV.shape[1]
    normalizer_B1 = logits_BV.logsumexp(1, keepdim=True)
    candidates = 256
    while True:
        candidates = min(candidates, vocabulary)
        whole = candidates == vocabulary
        logit_BK, token_BK = logits_BV.sort(dim=1, descending=True) if whole else logits_BV.topk(candidates, dim=1)
        probability_BK = (logit_BK - normalizer_B1).exp()
        before_BK = probability_BK.cumsum(1) - probability_BK
        inside_BK = before_BK < top_p
        inside_BK[:, 0] = True
        edge_B1 = logit_BK.masked_fill(~inside_BK, torch.inf).amin(1, keepdim=True)
        if whole or bool((logit_BK[:, -1:] < edge_B1).all()):
            return logit_BK.masked_fill(logit_BK < edge_B1, -torch.inf), token_BK
        candidates *= 16


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of SplitMix64 on int64 tensors, which wrap like uint64."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shift(x, 27)) * _signed(_MIX[1])
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 with the low 64 bits of ``constant``."""
    constant &= (1 << 64) - 1
    return constant - (1 << 64) if constant >= 1 << 63 else constant
