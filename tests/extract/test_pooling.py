"""Pooling: sums over each segment and nothing else, in float32, by the CPU's way and by the accelerator's."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from personaspace.extract.packing import MicroBatch, Segment
from personaspace.extract.pooling import HostCopy, Pooled, SegmentSums, SegmentWeights, to_device

CPU = torch.device("cpu")
Sum = Callable[[MicroBatch, torch.Tensor], NDArray[np.float32]]


def by_loop(batch: MicroBatch, h_BTD: torch.Tensor) -> NDArray[np.float32]:
    """As on a CPU."""
    sums = SegmentSums(batch, sites=1, layers=1, hidden=h_BTD.shape[2], device=CPU)
    sums.add(0, 0, h_BTD)
    return sums.sums_ZLSD[0, 0].numpy()


def by_weights(batch: MicroBatch, h_BTD: torch.Tensor) -> NDArray[np.float32]:
    """As on an accelerator."""
    sums_SD = torch.empty(len(batch.placed_segments), h_BTD.shape[2])
    SegmentWeights(batch, CPU).sum(h_BTD, out_SD=sums_SD)
    return sums_SD.numpy()


BOTH = pytest.mark.parametrize("summed", [by_loop, by_weights])


def exact(batch: MicroBatch, h_BTD: torch.Tensor) -> NDArray[np.float64]:
    """In float64, rollout by rollout."""
    states = h_BTD.double().numpy()
    places = zip(batch.origins, batch.segments, strict=True)
    return np.stack([states[row, o + a : o + b].sum(0) for (row, o), segments in places for a, b in segments])


def batch_of(lengths: Sequence[int], segments: Sequence[Sequence[Segment]], *, packed: bool = False) -> MicroBatch:
    return MicroBatch(
        rows=tuple(range(len(lengths))),
        token_ids=tuple((0,) * length for length in lengths),
        segments=tuple(tuple(own) for own in segments),
        packed=packed,
    )


def random_states(batch: MicroBatch, seed: int = 0, hidden: int = 8) -> torch.Tensor:
    """About one, as the massive dimensions of real models are: that is what a bfloat16 running sum loses."""
    return 1 + torch.randn((*batch.shape, hidden), generator=torch.Generator().manual_seed(seed))


@st.composite
def batches(draw: st.DrawFn, longest: int = 300) -> MicroBatch:
    """Rollouts with any number of segments each, which may overlap."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=5))
    own = [
        draw(
            st.lists(
                st.tuples(st.integers(0, length - 1), st.integers(1, length)).map(lambda s: (min(s), max(s))),
                max_size=4,
            )
        )
        for length in lengths
    ]
    segments = [[(start, max(stop, start + 1)) for start, stop in found] for found in own]
    segments[draw(st.integers(0, len(lengths) - 1))].append((0, 1))
    return batch_of(lengths, segments, packed=draw(st.booleans()))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(batch=batches(), seed=st.integers(0, 99))
def test_sums_over_segments(summed: Sum, dtype: torch.dtype, batch: MicroBatch, seed: int) -> None:
    h_BTD = random_states(batch, seed).to(dtype)
    expected_SD = exact(batch, h_BTD)
    got_SD = summed(batch, h_BTD)
    assert got_SD.dtype == np.float32
    error_S = np.linalg.norm(got_SD - expected_SD, axis=1) / np.linalg.norm(expected_SD, axis=1)
    assert error_S.max() <= 1e-6


@BOTH
def test_bfloat16_values_are_summed_in_float32(summed: Sum) -> None:
    """A bfloat16 running sum of ones sticks at 256, and one of such values is 2% off."""
    batch = batch_of([512], [[(0, 512)]])
    assert summed(batch, torch.ones(1, 512, 4, dtype=torch.bfloat16)).tolist() == [[512.0] * 4]
    h_BTD = random_states(batch).to(torch.bfloat16)
    expected_SD = exact(batch, h_BTD)
    running_D = torch.zeros(8, dtype=torch.bfloat16)
    for h_D in h_BTD[0]:
        running_D += h_D
    error = np.linalg.norm(running_D.double().numpy() - expected_SD[0]) / np.linalg.norm(expected_SD)
    assert error > 0.01
    assert np.linalg.norm(summed(batch, h_BTD) - expected_SD) / np.linalg.norm(expected_SD) <= 1e-6


@BOTH
def test_overlapping_segments_of_packed_rollouts(summed: Sum) -> None:
    batch = batch_of([3, 2], [[(0, 3), (1, 2), (1, 3)], [(0, 2), (1, 2)]], packed=True)
    h_BTD = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[None, :, None]
    assert summed(batch, h_BTD)[:, 0].tolist() == [7, 2, 6, 24, 16]


@BOTH
def test_a_rollout_without_segments(summed: Sum) -> None:
    batch = batch_of([2, 3, 1], [[], [(1, 3)], [(0, 1)]])
    h_BTD = torch.arange(9.0).reshape(3, 3, 1)
    assert summed(batch, h_BTD)[:, 0].tolist() == [9, 6]


@BOTH
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_what_lies_outside_of_a_segment_does_not_matter(summed: Sum, packed: bool, value: float) -> None:
    batch = batch_of([6, 4], [[(2, 6), (1, 3)], [(1, 3)]], packed=packed)
    h_BTD = random_states(batch)
    expected_SD = summed(batch, h_BTD)
    (first, second), (row, origin) = (0, 0), batch.origins[1]
    h_BTD[first, second] = value
    h_BTD[row, origin + 3 :] = value
    np.testing.assert_array_equal(summed(batch, h_BTD), expected_SD)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_inside_of_a_segment_shows(summed: Sum, dtype: torch.dtype, value: float) -> None:
    batch = batch_of([6, 4], [[(2, 6), (1, 3)], [(1, 3)]])
    h_BTD = random_states(batch).to(dtype)
    expected_SD = summed(batch, h_BTD)
    h_BTD[0, 1, 5] = value
    got_SD = summed(batch, h_BTD)
    assert np.isfinite(got_SD).all(axis=1).tolist() == [True, False, True]
    np.testing.assert_array_equal(got_SD[[0, 2]], expected_SD[[0, 2]])


@BOTH
def test_infinities_that_cancel_show(summed: Sum) -> None:
    h_BTD = torch.tensor([float("inf"), float("-inf")])[None, :, None]
    assert np.isnan(summed(batch_of([2], [[(0, 2)]]), h_BTD)).all()


def test_each_site_and_layer_has_its_place() -> None:
    sums = SegmentSums(batch_of([2, 2], [[(0, 2)], [(1, 2)]]), sites=2, layers=3, hidden=1, device=CPU)
    for site, layer in [(1, 2), (0, 1), (1, 0), (0, 0), (0, 2), (1, 1)]:
        sums.add(site, layer, torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]) + 10 * layer + 100 * site)
    assert sums.sums_ZLSD.shape == (2, 3, 2, 1)
    assert sums.sums_ZLSD[..., 0].tolist() == [
        [[4, 7], [24, 17], [44, 27]],
        [[204, 107], [224, 117], [244, 127]],
    ]


def test_scale() -> None:
    sums = SegmentSums(batch_of([2], [[(0, 2)]]), sites=1, layers=2, hidden=1, device=CPU)
    for layer, scale in [(0, 1.0), (1, 0.25)]:
        sums.add(0, layer, torch.tensor([[[1.0], [3.0]]]), scale)
    assert sums.sums_ZLSD.flatten().tolist() == [4, 1]


@pytest.mark.parametrize("shape", [(1, 3, 5), (1, 3, 3), (1, 4, 4), (2, 3, 4), (3, 4)])
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    sums = SegmentSums(batch_of([3], [[(0, 2)]]), sites=1, layers=1, hidden=4, device=CPU)
    with pytest.raises(RuntimeError) as error:
        sums.add(0, 0, torch.zeros(shape))
    assert str(error.value) == f"hidden states of shape {shape}, expected (1, 3, 4)"


@st.composite
def pooled(draw: st.DrawFn, shape: tuple[int, int] = (3, 2)) -> Pooled:
    """Whole numbers, which float32 adds exactly."""
    whole = st.integers(-(2**20), 2**20)
    sums = draw(st.lists(whole, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    counts = draw(st.lists(st.integers(1, 10**6), min_size=shape[0], max_size=shape[0]))
    return Pooled(sums_SD=np.array(sums, dtype=np.float32).reshape(shape), counts_S=np.array(counts, dtype=np.int64))


def assert_same(a: Pooled, b: Pooled) -> None:
    np.testing.assert_array_equal(a.sums_SD, b.sums_SD)
    np.testing.assert_array_equal(a.counts_S, b.counts_S)
    np.testing.assert_array_equal(a.means_SD, b.means_SD)
    assert a.sums_SD.dtype == a.means_SD.dtype == np.float32


@given(pooled(), pooled(), pooled())
def test_merging_is_associative_and_commutative(a: Pooled, b: Pooled, c: Pooled) -> None:
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a)


@given(length=st.integers(2, 60), data=st.data())
def test_parts_merge_into_the_whole(length: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, length - 1))
    batch = batch_of([length], [[(0, cut), (cut, length), (0, length)]])
    sums_SD = by_loop(batch, random_states(batch))
    first, second, whole = (
        Pooled(sums_SD=sums_SD[[number]], counts_S=np.array([stop - start]))
        for number, (start, stop) in enumerate(batch.segments[0])
    )
    np.testing.assert_allclose((first + second).means_SD, whole.means_SD, rtol=1e-5)
    assert (first + second).counts_S.tolist() == [length]


def test_means() -> None:
    found = Pooled(sums_SD=np.array([[2, 4], [0, 0], [3, 0]], dtype=np.float32), counts_S=np.array([2, 0, 1]))
    np.testing.assert_array_equal(found.means_SD, np.array([[1, 2], [np.nan, np.nan], [3, 0]], dtype=np.float32))
    stacked = Pooled(sums_SD=np.ones((2, 4, 3, 5), dtype=np.float32), counts_S=np.array([1, 2, 4]))
    assert stacked.means_SD.shape == (2, 4, 3, 5)
    assert stacked.means_SD[1, 2, :, 0].tolist() == [1, 0.5, 0.25]


def test_host_copy() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    copied = HostCopy(values).numpy()
    assert copied.dtype == np.float32
    assert copied.tolist() == values.tolist()
    assert to_device(values, CPU) is values
