"""Records of what operations return besides their result. They are no operations of their own: no list has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convblocks.opinfo import OPS
from convblocks.ops import depthwise_conv2d

_DEPTHWISE = OPS["depthwise_conv2d"]


def _by_its_means(y: Tensor, sums: Tensor) -> Tensor:
    """One map, of which every number, and every gradient, tells of both outputs."""
    return y * (sums / max(1, y.shape[2] * y.shape[3]))[:, :, None, None].to(y.dtype)


def _op(*args: Any, **kwargs: Any) -> Tensor:
    y, sums = depthwise_conv2d(*args, **kwargs, sums=True)
    return _by_its_means(y, sums)


def _reference(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(*args: Any, **kwargs: Any) -> Tensor:
        y = reference(*args, **kwargs)
        return _by_its_means(y, y.sum((2, 3), dtype=y.dtype if y.itemsize == 8 else torch.float32))

    return function


WITH_SUMS = dataclasses.replace(
    _DEPTHWISE,
    name="depthwise_conv2d_sums",
    op=_op,
    reference=_reference(_DEPTHWISE.reference),
    options=tuple(_DEPTHWISE.options[i] for i in (0, 1, 4, 7)),  # usual filters, and any
)
