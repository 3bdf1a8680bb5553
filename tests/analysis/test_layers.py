"""Layers on Dask: within the stated memory, and the same on threads and on `distributed`."""

import pytest

from personaspace.analysis.layers import plan_layers
from personaspace.store.errors import InputError


def test_layers_in_flight_are_bounded_by_workers_and_memory() -> None:
    plenty = plan_layers(80, 160, 3_000_000_000, workers=8, memory=64_000_000_000)
    assert (plenty.in_flight, plenty.parts) == (8, 1)
    tight = plan_layers(80, 160, 3_000_000_000, workers=8, memory=10_000_000_000)
    assert (tight.in_flight, tight.parts, tight.workers) == (3, 1, 3)


def test_rows_are_split_where_workers_outnumber_layers() -> None:
    assert plan_layers(4, 160, 1, workers=32, memory=100).parts == 8
    assert plan_layers(4, 8, 1, workers=32, memory=100).parts == 2, "a part has some blocks at least"
    assert plan_layers(1, 2, 1, workers=32, memory=100).parts == 1


def test_a_layer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError) as error:
        plan_layers(80, 160, 3_400_000_000, workers=8, memory=2_000_000_000)
    assert str(error.value) == (
        "analysis.memory: 2.00 GB; one layer takes 3.40 GB while it is fitted. Give more, or fit on machines that "
        "have it."
    )
