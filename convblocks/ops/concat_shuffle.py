from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convblocks.ops import checks
from convblocks.ops.channel_shuffle import reference as shuffle_reference
from convblocks.ops.operator import Operator

NAME = "concat_shuffle"


def _check_groups(channels: int, groups: int) -> None:
    if not (groups > 0 and channels % groups == 0):
        raise ValueError(f"{NAME}: expected groups that divide the {channels} channels, got {groups}")


def check(tensors: Sequence[Tensor], groups: int) -> None:
    checks.feature_maps(NAME, tensors)
    _check_groups(sum(t.shape[1] for t in tensors), groups)


def check_backward(grad: Tensor, channels: Sequence[int], groups: int) -> None:
    checks.feature_map(NAME, grad)
    if min(channels, default=0) < 0 or sum(channels) != grad.shape[1]:
        words = f"channels that add up to the {grad.shape[1]} of the gradient, got {list(channels)}"
        raise ValueError(f"{NAME}: expected {words}")
    _check_groups(sum(channels), groups)


def reference(tensors: Sequence[Tensor], groups: int) -> Tensor:
    return shuffle_reference(torch.cat(list(tensors), 1), groups)


operator = Operator(
    NAME,
    "(Tensor[] tensors, SymInt groups) -> Tensor",
    check,
    reference,
    linear=True,
    check_backward=check_backward,
)


def concat_shuffle(tensors: Sequence[Tensor], groups: int) -> Tensor:
    """The concatenation of maps along their channels, then their channel shuffle; in one pass over memory.

    Equal to ``channel_shuffle(torch.cat(tensors, 1), groups)``. The units of ShuffleNet V2 end in one of two maps and
    two groups: the channels of the maps alternate. Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
    Architecture Design", arXiv:1807.11164.

    Args:
        tensors: maps (N, C_i, H, W) of one N, H, W, dtype and device, at least one; float32, float64, float16 or
            bfloat16, any strides.
        groups: a divisor of the sum of all C_i.

    Returns:
        A tensor (N, sum of C_i, H, W) in the memory format of the first map.

    Raises:
        ValueError: no maps, a map is not 4-D or of another N, H or W, or groups does not divide the channels.
        TypeError: a map is not of a floating-point dtype, or of another one than the first.
        RuntimeError: a map is on another device than the first.

    Example:
        >>> left, right = torch.randn(2, 2, 58, 28, 28)
        >>> y = convblocks.ops.concat_shuffle([left, right], groups=2)
    """
    return operator(tensors, groups)
