"""Sums over spans, in float32, on the device where the hidden states are; means are taken on the host.

Shape suffixes: B batch, T tokens, D hidden, Z sites, L layers of the stage, S segments of the micro-batch.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from personaspace.extract.packing import MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Pooled:
    """Sums and counts over tokens: two of different tokens merge by adding both."""

    sums_SD: NDArray[np.float32]
    """Last dimensions (segments, hidden); sites and layers may come before."""
    counts_S: NDArray[np.int64]
    """Tokens in each sum."""

    def __add__(self, other: "Pooled") -> "Pooled":
        return Pooled(sums_SD=self.sums_SD + other.sums_SD, counts_S=self.counts_S + other.counts_S)

    @property
    def means_SD(self) -> NDArray[np.float32]:
        """NaN where no token was counted."""
        counts_S1 = self.counts_S[:, None].astype(np.float32)
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums_SD / counts_S1, dtype=np.float32)


class SegmentSums:
    """Collects the segment sums of one micro-batch at every site and layer: ``(Z, L, S, D)`` float32 on the device.

    States are reduced as they pass, so only one layer's states are alive at a time. On an accelerator a layer takes
    one batched product; on a CPU a loop over the segments is 8 times faster than that, since it reads nothing but
    them.
    """

    def __init__(self, batch: MicroBatch, *, sites: int, layers: int, hidden: int, device: torch.device) -> None:
        self._segments = batch.placed_segments
        self._shape = (*batch.shape, hidden)
        self.sums_ZLSD = torch.empty((sites, layers, len(self._segments), hidden), dtype=torch.float32, device=device)
        self._weights = None if device.type == "cpu" else SegmentWeights(batch, device)

    def add(self, site: int, layer: int, h_BTD: torch.Tensor, scale: float = 1.0) -> None:
        """Reduce the states at site number ``site`` of the stage's layer number ``layer``, times ``scale``."""
        if h_BTD.shape != self._shape:
            # PyTorch would resize the sums to fit, and only warn.
            raise RuntimeError(f"hidden states of shape {tuple(h_BTD.shape)}, expected {self._shape}")
        sums_SD = self.sums_ZLSD[site, layer]
        if self._weights is not None:
            self._weights.sum(h_BTD, out_SD=sums_SD)
        else:
            for segment, (row, start, stop) in enumerate(self._segments):
                torch.sum(h_BTD[row, start:stop], 0, dtype=torch.float32, out=sums_SD[segment])
        if scale != 1.0:
            sums_SD.mul_(scale)


class SegmentWeights:
    """Segment sums as a batched product with 0/1 weights, ``w_BST``: no loop and no host sync."""

    def __init__(self, batch: MicroBatch, device: torch.device) -> None:
        rows, length = batch.shape
        segments = batch.placed_segments
        place_of_segment = []
        used = [0] * rows
        for row, _, _ in segments:
            place_of_segment.append((row, used[row]))
            used[row] += 1
        w_BST = torch.zeros((rows, max(used, default=0), length), dtype=torch.bool)
        for (row, place), (_, start, stop) in zip(place_of_segment, segments, strict=True):
            w_BST[row, place, start:stop] = True
        index_S = torch.tensor([row * w_BST.shape[1] + place for row, place in place_of_segment], dtype=torch.long)
        self._w_BST = to_device(w_BST, device)
        self._index_S = to_device(index_S, device)

    def sum(self, h_BTD: torch.Tensor, out_SD: torch.Tensor) -> None:
        """Sum the states over every segment, accumulated in float32; NaN where one of its states is not finite."""
        # A token that overflows must cost no segment but its own: 0 * inf is NaN.
        lost_BT1 = torch.isfinite(h_BTD).all(dim=-1, keepdim=True).logical_not_()
        h_BTD = h_BTD.masked_fill(lost_BT1, 0.0)
        if h_BTD.is_cuda and h_BTD.dtype != torch.float32:
            sums_BSD = torch.bmm(self._w_BST.to(h_BTD.dtype), h_BTD, out_dtype=torch.float32)
        else:
            sums_BSD = torch.bmm(self._w_BST.float(), h_BTD.float())
        lost_BS1 = torch.bmm(self._w_BST.float(), lost_BT1.float()) > 0
        sums_BSD.masked_fill_(lost_BS1, float("nan"))
        torch.index_select(sums_BSD.flatten(0, 1), 0, self._index_S, out=out_SD)


class HostCopy:
    """One tensor on its way to the host: on CUDA through pinned memory and a stream of its own, without waiting."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.cpu()
            return
        stream = _copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        # Its memory must not be given to others while the copy runs.
        tensor.record_stream(stream)

    def numpy(self) -> NDArray[np.float32]:
        """Wait for the copy, and give its values."""
        if self._event is not None:
            self._event.synchronize()
        return np.asarray(self._host.numpy(), dtype=np.float32)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a host tensor to the device without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
