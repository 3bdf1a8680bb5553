"""Mean pooling over spans, in float32, on the device where the hidden states are.

Shape suffixes: B rows of the micro-batch, T padded tokens, D hidden, L layers of the stage.
"""

from collections.abc import Sequence

import torch


def span_weights(spans: Sequence[tuple[int, int]], length: int, device: torch.device) -> torch.Tensor:
    """``w_BT`` float32: 1/count inside each row's span ``[start, stop)``, 0 elsewhere."""
    bounds_B2 = torch.tensor(spans, device=device)
    position_T = torch.arange(length, device=device)
    inside_BT = (position_T >= bounds_B2[:, :1]) & (position_T < bounds_B2[:, 1:])
    count_B1 = (bounds_B2[:, 1:] - bounds_B2[:, :1]).clamp(min=1)
    return inside_BT.float() / count_B1


class SpanMeans:
    """Collects every layer's span means of one micro-batch: ``(L, B, D)`` float32 on the device.

    Each layer's hidden states are reduced as they pass, so only one layer's states are alive at a time.
    """

    def __init__(self, layers: int, weights_BT: torch.Tensor, hidden: int) -> None:
        self.means_LBD = torch.empty(
            (layers, weights_BT.shape[0], hidden), dtype=torch.float32, device=weights_BT.device
        )
        self._weights_B1T = weights_BT[:, None, :]
        self._outside_BT1 = weights_BT[:, :, None] == 0

    def add(self, index: int, h_BTD: torch.Tensor) -> None:
        """Reduce the hidden states of the stage's layer number ``index``."""
        # Outside its span a row may overflow (0 * inf is NaN), and that must not cost it.
        inside_BTD = h_BTD.float().masked_fill(self._outside_BT1, 0.0)
        torch.bmm(self._weights_B1T, inside_BTD, out=self.means_LBD[index][:, None, :])
