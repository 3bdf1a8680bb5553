"""Pooling: float32 accumulation over the span and over nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from personaspace.extract.pooling import SpanMeans, span_weights

CPU = torch.device("cpu")


def pool(h_BTD: torch.Tensor, spans: list[tuple[int, int]]) -> np.ndarray:
    means = SpanMeans(1, span_weights(spans, h_BTD.shape[1], CPU), h_BTD.shape[2])
    means.add(0, h_BTD)
    return means.means_LBD[0].numpy()


def exact(h_BTD: torch.Tensor, spans: list[tuple[int, int]]) -> np.ndarray:
    pairs = zip(h_BTD.double().numpy(), spans, strict=True)
    return np.stack([h_TD[start:stop].mean(0) for h_TD, (start, stop) in pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
def test_mean_over_the_span(dtype: torch.dtype, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 600))
    start = st.integers(0, length - 1)
    spans = data.draw(
        st.lists(start.flatmap(lambda s: st.tuples(st.just(s), st.integers(s + 1, length))), min_size=1, max_size=4)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # A mean of about one, as the massive dimensions of real models have, is what a bfloat16 running sum loses.
    h_BTD = (1 + torch.randn(len(spans), length, 8, generator=generator)).to(dtype)
    expected_BD = exact(h_BTD, spans)
    pooled_BD = pool(h_BTD, spans)
    assert pooled_BD.dtype == np.float32
    error_B = np.linalg.norm(pooled_BD - expected_BD, axis=1) / np.linalg.norm(expected_BD, axis=1)
    assert error_B.max() < 1e-6


def test_bfloat16_values_are_summed_in_float32() -> None:
    """A bfloat16 running sum of 512 ones sticks at 256."""
    h_BTD = torch.ones(1, 512, 4, dtype=torch.bfloat16)
    np.testing.assert_allclose(pool(h_BTD, [(0, 512)]), 1, rtol=1e-6)


def test_each_layer_has_its_place() -> None:
    means = SpanMeans(3, span_weights([(0, 2), (1, 2)], 2, CPU), 1)
    for layer in (2, 0, 1):
        means.add(layer, torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]) + 10 * layer)
    assert means.means_LBD[:, :, 0].tolist() == [[2, 7], [12, 17], [22, 27]]


def test_weights() -> None:
    assert span_weights([(1, 3), (0, 4), (2, 2)], 4, CPU).tolist() == [
        [0, 0.5, 0.5, 0],
        [0.25, 0.25, 0.25, 0.25],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize("padding", [0.0, 1e30, float("inf"), float("nan")])
def test_padding_does_not_matter(padding: float) -> None:
    h_BTD = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    spans = [(2, 6), (1, 3)]
    expected_BD = pool(h_BTD, spans)
    h_BTD[1, 3:] = padding
    np.testing.assert_array_equal(pool(h_BTD, spans), expected_BD)
