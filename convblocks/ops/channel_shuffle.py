from __future__ import annotations

import torch
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.operator import Operator


def check(x: Tensor, groups: int) -> None:
    checks.feature_map("channel_shuffle", x)
    if not (groups > 0 and x.shape[1] % groups == 0):
        raise ValueError(f"channel_shuffle: expected groups that divide the {x.shape[1]} channels, got {groups}")


def reference(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    shuffled = x.reshape(n, groups, c // groups, h, w).transpose(1, 2)
    return shuffled.clone(memory_format=torch.contiguous_format).view(n, c, h, w)  # never a view of the input


operator = Operator("channel_shuffle", "(Tensor x, SymInt groups) -> Tensor", check, reference, linear=True)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Mixes the channels of groups: channel ``i * C / groups + j`` becomes channel ``j * groups + i``.

    As ``torch.nn.functional.channel_shuffle``, but channels_last stays channels_last. ``C // groups`` groups undo it.
    Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices",
    arXiv:1707.01083.

    Args:
        x: (N, C, H, W); float32, float64, float16 or bfloat16, any strides.
        groups: a divisor of C.

    Returns:
        A tensor like x, in its memory format.

    Raises:
        ValueError: x is not 4-D, or groups does not divide C.
        TypeError: x is not of a floating-point dtype.

    Example:
        >>> x = torch.randn(2, 12, 28, 28)
        >>> y = convblocks.ops.channel_shuffle(x, groups=3)
    """
    return operator(x, groups)
