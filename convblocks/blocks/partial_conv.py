from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.layers import fusible
from convblocks.ops.partial_conv2d import operator, partial_conv2d


def fused_forward(run: Callable[..., Tensor] = operator) -> Callable[[Any, Tensor], Tensor]:
    """A forward that runs ``self.partial_conv3`` and what is around it as one operation."""

    def forward(self: Any, x: Tensor) -> Tensor:
        conv = self._modules["partial_conv3"]
        traced = isinstance(x, torch.fx.Proxy)
        if not fusible(x, nn.Conv2d, conv) or (not traced and torch.is_autocast_enabled(x.device.type)):
            return self.unfused(x)  # type: ignore[no-any-return]  # autocast leaves the other channels as they are
        return run(x, conv._parameters["weight"])

    return forward


class PartialConv(nn.Module):
    """Partial convolution: a 3x3 convolution of the first channels; the others are passed on as they are.

    One operation (``convblocks.ops.partial_conv2d``). Chen et al., "Run, Don't Walk: Chasing Higher FLOPS for Faster
    Neural Networks" (FasterNet), arXiv 2303.03667.

    The key of the state dict (``partial_conv3``) is that of the authors and of timm's Partial_conv3.

    Args:
        dim: channels C of the input.
        n_div: the convolution takes the first C // n_div.
        forward: "split_cat" or "slicing", the two ways of the authors; here they are one, which never changes its input
            unless ``inplace`` says so.
        kernel_size: odd.
        inplace: writes into the input where no gradient is wanted: nothing but the first channels moves.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: numbers that are not positive, an even kernel_size, no channel to convolve, an unknown forward.

    Example:
        >>> y = convblocks.PartialConv(64)(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        forward: str = "split_cat",
        *,
        kernel_size: int = 3,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "PartialConv"
        p = positive(name, "dim", dim) // positive(name, "n_div", n_div)
        if p == 0:
            raise ValueError(f"{name}: expected n_div of at most {dim}, the channels, got {n_div}")
        if positive(name, "kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"{name}: expected an odd kernel_size, got {kernel_size}")
        if forward not in ("split_cat", "slicing"):
            raise ValueError(f"{name}: expected forward to be one of split_cat, slicing, got {forward}")
        self.inplace = inplace
        self.partial_conv3 = nn.Conv2d(
            p, p, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.partial_conv3.weight
        if not fusible(x, nn.Conv2d, self.partial_conv3):
            p = self.partial_conv3.in_channels
            return torch.cat((self.partial_conv3(x[:, :p]), x[:, p:]), 1)
        inplace = self.inplace and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        return partial_conv2d(x, weight, inplace=inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""
