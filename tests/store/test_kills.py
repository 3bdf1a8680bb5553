"""Some of the trials of each kind. The long table: python -m tests.store.kills"""

import random
from collections.abc import Iterator

import pytest

from tests.store.kill_laboratory import Laboratory
from tests.store.kills import laboratory, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["local", "s3"])
def here(request: pytest.FixtureRequest) -> Iterator[Laboratory]:
    with laboratory(request.param, random.Random(1), calibrations=1) as made:
        yield made


@pytest.mark.parametrize("number", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in (4, 5))])
def test_run_that_is_killed_at_any_moment_resumes_to_identical_objects(here: Laboratory, number: int) -> None:
    trial = here.trial(number, aimed=False)
    assert not trial.failed, trial


@pytest.mark.parametrize("number", [2, pytest.param(5, marks=pytest.mark.nightly)])
def test_crash_between_publish_and_record_is_found_and_adopted(here: Laboratory, number: int) -> None:
    trial = here.trial(number, aimed=True)
    assert not trial.failed, trial
    assert trial.hit
    # The orphans of a kill: adopted, or a unit's coordinates, which are written again, or taken by gc.
    assert trial.adopted or trial.collected or "driver" in trial.aim
    assert table([trial]).count("\n") == 2
