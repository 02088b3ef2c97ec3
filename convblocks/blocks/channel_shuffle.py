from __future__ import annotations

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.ops.channel_shuffle import operator


class ChannelShuffle(nn.Module):
    """Mixes the channels of groups: channel ``i * C / groups + j`` becomes channel ``j * groups + i``.

    One operation, ``convblocks.ops.channel_shuffle``; as ``torch.nn.ChannelShuffle``, but channels_last stays
    channels_last. Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
    arXiv 1707.01083.

    Args:
        groups: a divisor of the channels C.
        inverse: the other way, as Megvii's ShuffleNet V1 shuffles: with C / groups groups.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: groups is no positive integer; in the forward, no divisor of C.

    Example:
        >>> y = convblocks.ChannelShuffle(3)(torch.randn(2, 12, 28, 28))
    """

    def __init__(self, groups: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.groups = positive("ChannelShuffle", "groups", groups)
        self.inverse = inverse

    def forward(self, x: Tensor) -> Tensor:
        if self.inverse and (isinstance(x, torch.fx.Proxy) or x.shape[1] % self.groups == 0):
            return operator(x, x.shape[1] // self.groups)
        return operator(x, self.groups)  # which refuses other groups

    def extra_repr(self) -> str:
        return f"groups={self.groups}" + (", inverse=True" if self.inverse else "")
