"""Judging that is killed and resumed. The long table: python -m tests.extract.judging.kills --rounds 20"""

import random
import signal

import pytest

from tests.extract.judging.kills import Laboratory


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.mark.slow
@pytest.mark.parametrize(("share", "budget_share"), [(0.6, 0.8)])
def test_killed_judge_goes_on_and_asks_about_nothing_twice(
    laboratory: Laboratory, share: float, budget_share: float
) -> None:
    found = laboratory.kill(f"killed-{share}", share * laboratory.seconds, budget_share=budget_share)
    assert found.is_sound, found


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_interrupted_judge_commits_what_it_has(laboratory: Laboratory, number: signal.Signals) -> None:
    found = laboratory.kill(f"interrupted-{number.name}", 0.5 * laboratory.seconds, budget_share=3, number=number)
    assert found.is_sound, found
    assert found.committed > 0
    assert found.journalled == 0
    assert found.lost_on_the_way <= 16 + 8  # Those under way, and failures that nothing came after.


@pytest.mark.nightly
def test_random_moments(laboratory: Laboratory) -> None:
    chance = random.Random(1)
    for number in range(6):
        moment = chance.uniform(0, laboratory.seconds)
        found = laboratory.kill(f"round-{number}", moment, budget_share=(3, 0.6)[number % 2])
        assert found.is_sound, found
