"""The sampler: it draws from the right distribution, and a rollout's draws depend on the rollout alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from personaspace.extract.generate.noise import GumbelTopP, gumbel, nucleus, rollout_seed

MASK = (1 << 64) - 1


def sample(
    logits_BV: torch.Tensor, seeds: list[int], step: int = 0, *, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """Scores of one decoding step, prompts being 3 tokens long."""
    sampler = GumbelTopP(seeds, temperature=temperature, top_p=top_p, prompt_length=3)
    return sampler(torch.zeros(len(seeds), 3 + step, dtype=torch.long), logits_BV)


def test_rollout_seed_is_stable() -> None:
    assert rollout_seed(0, "a3f0") == 2480798396523373466
    assert rollout_seed(0, "a3f0") != rollout_seed(1, "a3f0")
    seeds = {rollout_seed(0, f"{number:016x}") for number in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 5000), st.integers(0, 300_000))
def test_noise_is_splitmix64_of_seed_step_and_token(seed: int, step: int, token: int) -> None:
    """Spelt out with Python's own integers, so that the noise is the same on every device and in every version."""

    def splitmix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    state = splitmix((seed + 0x9E3779B97F4A7C15 * (step + 1)) & MASK)
    state = splitmix((state + 0x9E3779B97F4A7C15 * (token + 1)) & MASK)
    expected = -math.log(-math.log(((state >> 11) + 0.5) * 2.0**-53))
    noise = gumbel(torch.tensor([seed]), torch.tensor([step]), torch.tensor([[token]]))
    assert noise.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("axis", ["seeds", "steps", "tokens"])
def test_noise_is_gumbel_and_uncorrelated(axis: str) -> None:
    count = 100_000
    if axis == "seeds":
        noise = gumbel(
            torch.arange(count), torch.zeros(count, dtype=torch.long), torch.zeros(count, 1, dtype=torch.long)
        )
    elif axis == "tokens":
        noise = gumbel(torch.tensor([7]), torch.tensor([0]), torch.arange(count)[None])
    else:
        token_BK = torch.arange(100)[None]
        noise = torch.cat([gumbel(torch.tensor([7]), torch.tensor([step]), token_BK) for step in range(count // 100)])
    values = noise.flatten().double().numpy()
    assert noise.dtype == torch.float32
    assert stats.kstest(values, "gumbel_r").pvalue > 0.01
    assert values.mean() == pytest.approx(0.5772, abs=4 * values.std() / math.sqrt(count))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.6), (0.3, 1.0)])
def test_frequencies_match_the_softmax(temperature: float, top_p: float) -> None:
    count = 20_000
    logits_V = torch.tensor([1.0, -0.5, 0.2, 0.9, -2.0, 0.0, 0.6])
    tokens = sample(logits_V.expand(count, -1), list(range(count)), temperature=temperature, top_p=top_p).argmax(1)
    expected = naive_nucleus(logits_V.double().numpy() / temperature, top_p)
    expected = np.exp(expected) / np.exp(expected).sum()
    observed = np.bincount(tokens.numpy(), minlength=len(expected))
    assert observed[expected == 0].sum() == 0
    inside = expected > 0
    assert inside.sum() > 1
    assert stats.chisquare(observed[inside], count * expected[inside]).pvalue > 0.01


def test_steps_draw_anew() -> None:
    logits_BV = torch.zeros(200, 50)
    first, second = (sample(logits_BV, list(range(200)), step).argmax(1) for step in (0, 1))
    assert 0 < int((first == second).sum()) < 20
    assert torch.equal(sample(logits_BV, list(range(200)), 1).argmax(1), second)


def test_neighbours_and_order_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    # From peaked to flat: a flat row makes the search widen for the whole batch.
    logits_BV = torch.randn(8, 5000, generator=generator) * torch.tensor([8, 4, 2, 1, 0.5, 0.2, 0.1, 0])[:, None]
    seeds = [rollout_seed(0, str(row)) for row in range(8)]
    together_BV = sample(logits_BV, seeds, 5, temperature=0.7, top_p=0.9)
    for row in range(8):
        alone_1V = sample(logits_BV[row : row + 1], seeds[row : row + 1], 5, temperature=0.7, top_p=0.9)
        assert torch.equal(alone_1V[0], together_BV[row])
    order = [3, 7, 0, 5]
    some_BV = sample(logits_BV[order], [seeds[row] for row in order], 5, temperature=0.7, top_p=0.9)
    assert torch.equal(some_BV, together_BV[order])


def naive_nucleus(logits_V: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Logits with -inf outside the nucleus, by sorting everything."""
    order = np.argsort(-logits_V)
    probability_V = np.exp(logits_V[order] - logits_V.max())
    probability_V /= probability_V.sum()
    before_V = np.cumsum(probability_V) - probability_V
    last = np.flatnonzero(before_V < top_p)[-1]
    return np.where(logits_V >= logits_V[order[last]], logits_V, -np.inf)


def check_nucleus(logits_V: torch.Tensor, top_p: float) -> None:
    exact_V = logits_V.double().numpy()
    expected_V = naive_nucleus(exact_V, top_p)
    # What hangs on rounding is no test.
    assume(np.array_equal(naive_nucleus(exact_V, top_p - 1e-5), naive_nucleus(exact_V, top_p + 1e-5)))
    np.testing.assert_array_equal(dense_nucleus(logits_V[None], top_p)[0], expected_V)


def dense_nucleus(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    logit_BK, token_BK = nucleus(logits_BV, top_p)
    return torch.full_like(logits_BV, -torch.inf).scatter(1, token_BK, logit_BK)


TOP_P = st.floats(0.01, 0.99)


@given(st.lists(st.integers(-8, 8).map(lambda half: half / 2), min_size=1, max_size=30), TOP_P)
def test_nucleus_equals_a_full_sort_with_ties(logits: list[float], top_p: float) -> None:
    check_nucleus(torch.tensor(logits), top_p)


@given(st.integers(250, 5000), st.sampled_from([0.1, 1.0, 3.0, 10.0]), TOP_P, st.booleans(), st.integers(0, 9))
def test_nucleus_equals_a_full_sort_of_a_large_vocabulary(
    vocabulary: int, spread: float, top_p: float, tied: bool, seed: int
) -> None:
    logits_V = spread * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed))
    if tied:
        logits_V = logits_V.bfloat16().float()
    check_nucleus(logits_V, top_p)


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 3000])
def test_flat_logits_are_one_big_tie(vocabulary: int) -> None:
    assert torch.isfinite(dense_nucleus(torch.zeros(2, vocabulary), 0.01)).all()


def test_the_most_probable_token_is_always_inside() -> None:
    assert torch.isfinite(dense_nucleus(torch.tensor([[9.0, 1.0, 0.0]]), 1e-9)).tolist() == [[True, False, False]]
