import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.judging.config import JudgeConfig
from personaspace.extract.judging.cost import Prices, Purse, most_tokens
from personaspace.store.errors import InputError


@given(
    budget=st.floats(0.01, 2),
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 12),
)
def test_a_purse_is_never_overdrawn_nor_is_more_spent_than_was_granted(budget: float, seed: int, workers: int) -> None:
    chance = random.Random(seed)
    granted = [0.0]

    async def grant(usd: float) -> None:
        await asyncio.sleep(0)
        assert usd <= budget
        granted.append(usd)

    async def work(purse: Purse) -> None:
        while True:
            most = chance.uniform(0.001, 0.1)
            if not await purse.reserve(most, step=3 * most):
                return
            await asyncio.sleep(0)
            usd = chance.uniform(0, most)
            assert purse.spent + usd <= granted[-1] + 1e-9
            purse.settle(most, usd)

    async def main() -> Purse:
        purse = Purse(budget, grant)
        await asyncio.wait_for(asyncio.gather(*(work(purse) for _ in range(workers))), 10)
        return purse

    purse = asyncio.run(main())
    assert purse.is_empty
    assert budget - 0.1 <= purse.spent <= budget + 1e-9


def test_without_a_budget_nothing_is_granted_and_all_is_counted() -> None:
    async def grant(usd: float) -> None:
        raise AssertionError

    async def main() -> Purse:
        purse = Purse(None, grant)
        assert await purse.reserve(10, step=1)
        purse.settle(10, 4)
        return purse

    assert asyncio.run(main()).spent == 4


def test_a_prompt_has_no_more_tokens_than_bytes() -> None:
    assert most_tokens([{"role": "user", "content": "é" * 100}]) >= 200


def test_prices_come_together() -> None:
    assert Prices.of(JudgeConfig()) is None
    prices = Prices.of(JudgeConfig(price_in=2, price_out=8))
    assert prices is not None
    assert prices.usd(1_000_000, 500_000) == 6
    with pytest.raises(InputError, match=r"judge.price_in, judge.price_out: give both, or neither"):
        Prices.of(JudgeConfig(price_in=2))
