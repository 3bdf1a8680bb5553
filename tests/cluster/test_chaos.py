"""A short version of the trials of chaos.py, whose table is in docs/chaos.md."""

import random
from collections.abc import Iterator

import pytest

from tests.cluster.chaos import KINDS, Laboratory, disturb, laboratory


@pytest.fixture(scope="module")
def place() -> Iterator[Laboratory]:
    with laboratory(stages=1, replicas=1) as place:
        yield place


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "node killed",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("store read-only 5 s", "driver killed")),
    ],
)
def test_a_disturbed_extraction_ends_as_an_undisturbed_one(place: Laboratory, name: str) -> None:
    random.seed(0)
    [kind] = [kind for kind in KINDS if (kind.step, kind.name) == ("extract", name)]
    trial = disturb(place, kind, 0.3, name.replace(" ", "-"))
    assert trial.complete
    assert trial.identical
    assert trial.commands == (2 if name == "driver killed" else 1) or trial.what.startswith("raylet")
