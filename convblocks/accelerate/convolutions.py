"""Rules for convolutions that are not dense, of torch and of other libraries."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from convblocks.accelerate.rule import Refused, Rule
from convblocks.blocks import depthwise_conv2d as depthwise_block
from convblocks.blocks import partial_conv as partial_block


def _is_depthwise(module: Any) -> bool:
    ours = isinstance(module, depthwise_block.DepthwiseConv2d)
    return 1 < getattr(module, "groups", 1) == module.in_channels and not ours


def _check_depthwise(module: Any) -> None:
    if not {"weight", "bias"} <= module._parameters.keys():
        raise Refused("it computes its weight or bias (pruned, weight norm or spectral norm)")
    if module.padding_mode != "zeros":
        raise Refused(f"its padding mode is {module.padding_mode}")


def _pixels(module: Any) -> tuple[int, int]:
    """Enough for a result of two pixels without padding."""
    pairs = zip((5, 6), module.kernel_size, module.dilation, module.stride, strict=True)
    h, w = (max(least, d * (k - 1) + 1 + s) for least, k, d, s in pairs)
    return h, w


def depthwise(name: str, source: str, same: bool) -> Rule:
    """A rule for convolutions of which each filter sees one channel; ``same``: they pad as TensorFlow does."""
    return Rule(
        name,
        source,
        "depthwise_conv2d",
        partial(depthwise_block.fused_forward, same),
        channels=lambda module: module.in_channels,
        check=_check_depthwise,
        options={},
        applies=_is_depthwise,
        pixels=_pixels,
    )


def _bound(module: Any) -> str:
    name: str = module.__dict__["forward"].__name__ if "forward" in module.__dict__ else module.forward_name
    return name


def partial_conv(name: str, source: str, slicing: str, split_cat: str) -> Rule:
    """A rule for FasterNet's partial convolution, which binds one of two methods as its forward. That of slicing writes
    over what its convolution was given, and cannot be differentiated."""

    def check(module: Any) -> None:
        conv = module._modules["partial_conv3"]
        if type(conv) is not nn.Conv2d or conv._parameters.keys() != {"weight", "bias"}:
            raise Refused("partial_conv3 is not a plain torch.nn.Conv2d")
        k = conv.kernel_size[0]
        plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
        if not plain or conv.bias is not None or conv.kernel_size != (k, k) or conv.padding != (k // 2, k // 2):
            raise Refused("partial_conv3 is not a convolution that keeps the size, without bias")

    return Rule(
        name,
        source,
        "partial_conv2d",
        partial_block.fused_forward,
        channels=lambda module: module.dim_conv3 + module.dim_untouched,
        check=check,
        options={"forward_name": _bound},
        methods=(slicing, split_cat),
        differentiable=lambda module: _bound(module) != slicing,
    )
