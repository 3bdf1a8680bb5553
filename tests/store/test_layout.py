"""Units, layer groups, stages and keys: every value has exactly one place."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personaspace.store.layout import (
    Layout,
    choose_layer_group,
    choose_unit_rows,
    coordinate_key,
    interleave,
    rollouts_key,
    shard_key,
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    layers = draw(st.integers(1, 100))
    return Layout(
        segments=tuple(draw(st.lists(st.integers(1, 1500), min_size=1, max_size=4))),
        layers=layers,
        hidden=draw(st.integers(1, 64)),
        unit_rows=draw(st.integers(1, 300)),
        layer_group=draw(st.integers(1, layers)),
    )


@given(layouts())
def test_every_planned_row_lies_in_exactly_one_unit(layout: Layout) -> None:
    rows = [row for unit in range(layout.units) for row in layout.unit_row_range(unit)]
    assert rows == list(layout.planned_rows())
    assert rows == sorted(set(rows))
    assert len(rows) == layout.rows
    for unit in range(layout.units):
        part, planned = layout.unit_slice(unit), layout.unit_row_range(unit)
        assert part.start == planned.start
        assert planned.start < planned.stop <= part.stop


@given(layouts())
def test_units_cover_the_padded_axis(layout: Layout) -> None:
    slices = [layout.unit_slice(unit) for unit in range(layout.units)]
    assert [part.start for part in slices] == list(range(0, layout.padded_rows, layout.unit_rows))
    assert slices[-1].stop == layout.padded_rows
    assert 0 <= layout.padded_rows - layout.rows < layout.unit_rows * len(layout.segments)


@given(layouts())
def test_padding_lies_only_at_the_end_of_each_segment(layout: Layout) -> None:
    assert [unit for units in layout.segment_units for unit in units] == list(range(layout.units))
    for units, rows in zip(layout.segment_units, layout.segments, strict=True):
        assert sum(len(layout.unit_row_range(unit)) for unit in units) == rows
        assert all(len(layout.unit_row_range(unit)) == layout.unit_rows for unit in units[:-1])
        assert 1 <= len(layout.unit_row_range(units[-1])) <= layout.unit_rows


@given(layouts(), st.integers(1, 1500))
def test_growth_keeps_the_earlier_units(layout: Layout, rows: int) -> None:
    grown = layout.grow(rows)
    assert (grown.rows, grown.segments[:-1]) == (layout.rows + rows, layout.segments)
    for unit in range(layout.units):
        assert grown.unit_row_range(unit) == layout.unit_row_range(unit)
        assert grown.unit_slice(unit) == layout.unit_slice(unit)
    new = list(grown.planned_rows())[layout.rows :]
    assert new == list(range(layout.padded_rows, layout.padded_rows + rows))
    assert grown.segment_units[-1].start == layout.units
    assert replace(grown, segments=layout.segments) == layout


@pytest.mark.parametrize("unit", [-1, 4, 100])
def test_a_unit_that_is_not_there_is_refused(unit: int) -> None:
    layout = Layout(segments=(9, 3), layers=1, hidden=1, unit_rows=4, layer_group=1)
    assert layout.units == 4
    with pytest.raises(ValueError, match=f"^unit {unit} of a run with 4 units$"):
        layout.unit_row_range(unit)


def test_segments_of_a_run_that_grew_twice() -> None:
    layout = Layout(segments=(9,), layers=1, hidden=1, unit_rows=4, layer_group=1).grow(1).grow(4)
    assert layout.segment_units == [range(3), range(3, 4), range(4, 5)]
    assert [layout.unit_row_range(unit) for unit in range(5)] == [
        range(4),
        range(4, 8),
        range(8, 9),
        range(12, 13),
        range(16, 20),
    ]
    assert (layout.rows, layout.padded_rows) == (14, 20)


@given(layouts(), st.integers(1, 5))
def test_places_for_spans_follow_the_rows(layout: Layout, capacity: int) -> None:
    """The spans of row r lie at r * capacity and after, padding included, so growth moves none."""
    spans = layout.of_spans(capacity)
    assert (spans.units, spans.padded_rows) == (layout.units, layout.padded_rows * capacity)
    for unit in range(layout.units):
        rows, places = layout.unit_slice(unit), spans.unit_slice(unit)
        assert (places.start, places.stop) == (rows.start * capacity, rows.stop * capacity)
        assert spans.unit_row_range(unit) == range(places.start, places.stop)


@given(layouts())
def test_every_layer_lies_in_exactly_one_group(layout: Layout) -> None:
    layers = [layer for group in range(layout.groups) for layer in layout.group_layers(group)]
    assert layers == list(range(layout.layers))


@given(layouts(), st.data())
def test_stages_cut_all_layers_between_groups(layout: Layout, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layout.groups))
    cuts = layout.stage_boundaries(stages)
    assert len(cuts) == stages + 1
    assert (cuts[0], cuts[-1]) == (0, layout.layers)
    assert all(cut % layout.layer_group == 0 for cut in cuts[:-1])
    groups_of_stage = [-(-stop // layout.layer_group) - first // layout.layer_group for first, stop in pairwise(cuts)]
    assert sum(groups_of_stage) == layout.groups
    assert min(groups_of_stage) >= 1
    assert max(groups_of_stage) - min(groups_of_stage) <= 1


@pytest.mark.parametrize("stages", [0, 7])
def test_more_stages_than_groups_are_refused(stages: int) -> None:
    layout = Layout(segments=(24,), layers=30, hidden=576, unit_rows=24, layer_group=5)
    with pytest.raises(ValueError, match=rf"^stages must be 1 to 6 \(layer groups of 5\), not {stages}$"):
        layout.stage_boundaries(stages)


@pytest.mark.parametrize(
    ("role_rows", "expected"),
    [
        ([1200] * 276, 120),
        ([192] + [24] * 40, 24),
        ([128, 256], 128),
        ([7, 13], 20),  # No common divisor: a small run is one unit,
        ([131] * 10, 64),  # and a larger one has units that mix roles.
    ],
)
def test_unit_rows(role_rows: list[int], expected: int) -> None:
    assert choose_unit_rows(role_rows) == expected


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8))
def test_unit_rows_divide_each_role_or_are_a_default(role_rows: list[int]) -> None:
    unit_rows = choose_unit_rows(role_rows)
    assert 1 <= unit_rows <= 128
    assert all(rows % unit_rows == 0 for rows in role_rows) or unit_rows == min(64, sum(role_rows))


@pytest.mark.parametrize(("layers", "expected"), [(80, 10), (30, 5), (32, 4), (36, 6), (61, 8), (6, 1), (1, 1)])
def test_layer_group(layers: int, expected: int) -> None:
    assert choose_layer_group(layers) == expected


@given(st.integers(1, 300))
def test_layer_group_is_usable(layers: int) -> None:
    group = choose_layer_group(layers)
    assert 1 <= group <= max(10, -(-layers // 8))
    assert group <= layers


@given(st.lists(st.integers(0, 5), max_size=40).map(sorted))
def test_interleave_takes_the_nth_unit_of_all_roles_before_the_next(roles: list[int]) -> None:
    order = interleave(roles)
    assert sorted(order) == list(range(len(roles)))
    seen: Counter[int] = Counter()
    ranks = []
    for unit in order:
        ranks.append(seen[roles[unit]])
        seen[roles[unit]] += 1
    assert ranks == sorted(ranks)
    for role in set(roles):  # Within a role, units keep their order.
        own = [unit for unit in order if roles[unit] == role]
        assert own == sorted(own)


def test_keys() -> None:
    assert shard_key("resid_post_mean", 7, 2) == "activations.zarr/resid_post_mean/c/7/2/0"
    assert coordinate_key("role", 7) == "activations.zarr/role/c/7"
    assert rollouts_key(7) == "rollouts/000007.parquet"
