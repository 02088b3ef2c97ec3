"""Channel shuffle, y[j * G + i] = x[i * C / G + j] for i < G and j < C / G: the way back of a concat_shuffle of one map
with C / G groups, which writes in order."""

from __future__ import annotations

from torch import Tensor

from convblocks.kernels.concat_shuffle import concat_shuffle_backward


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    channels = x.shape[1]
    return concat_shuffle_backward(x, [channels], channels // groups)[0]


def channel_shuffle_backward(grad: Tensor, groups: int) -> Tensor:
    return channel_shuffle(grad, grad.shape[1] // groups)
