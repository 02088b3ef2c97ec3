from __future__ import annotations

import torch
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.operator import Operator


def check(x: Tensor, channel: Tensor | None) -> None:
    op = "channel_pool"
    checks.feature_map(op, x)
    if x.shape[1] == 0:
        raise ValueError(f"{op}: expected at least one channel, got an input of size {list(x.shape)}")
    checks.sized(op, "channel", channel, x, [*x.shape[:2], 1, 1])


def reference(x: Tensor, channel: Tensor | None = None) -> Tensor:
    v = x if channel is None else x * channel.to(x.dtype)
    return torch.cat((v.mean(1, keepdim=True), v.amax(1, keepdim=True)), 1)


operator = Operator(
    "channel_pool",
    "(Tensor x, Tensor? channel) -> Tensor",
    check,
    reference,
    output_size=lambda x, channel: (x.shape[0], 2, *x.shape[2:]),
)


def channel_pool(x: Tensor, channel: Tensor | None = None) -> Tensor:
    """Mean and maximum over the channels of each pixel, of ``x * channel`` where gates of the channels are given.

    What the spatial half of the convolutional block attention module convolves, from one read of x: the product is
    never written. Woo et al., "CBAM", arXiv 1807.06521.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16 (sums in float32, or float64), any strides.
        channel: (N, C, 1, 1), of the dtype of x, or float32 with a half-precision x; or None.

    Returns:
        (N, 2, H, W), the means and then the maxima, in the memory format of x. Channels that share the maximum share
        its gradient equally, as of ``torch.amax``.

    Raises:
        ValueError: a wrong rank or size, or no channels.
        TypeError: a dtype other than the above.
        RuntimeError: channel is on another device than x.

    Example:
        >>> x, channel = torch.randn(2, 64, 56, 56), torch.rand(2, 64, 1, 1)
        >>> mean, maximum = convblocks.ops.channel_pool(x, channel).unbind(1)
    """
    return operator(x, channel)
