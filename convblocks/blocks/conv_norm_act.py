from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from convblocks.blocks.arguments import Layer, positive
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d, Pair
from convblocks.blocks.fused import Layers


class ConvNormAct(Layers):
    """A convolution, the batch norm of what comes of it, and an activation.

    A convolution with a filter for each channel is a ``DepthwiseConv2d``, norm and activation are one
    ``BatchNormAct2d``. Ioffe et al., "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", arXiv 1502.03167.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: of the convolution. Without a
            padding, the size stays but for the stride.
        activation: a name, a module, or a class or partial that makes one; "none": nothing.
        eps, momentum: of the norm.
        negative_slope: of the activation leaky_relu.
        names: those of the two layers in the keys of the state dict: as timm's and Inception's, or ("0", "1") as
            torchvision's.
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').

    Raises:
        ValueError: channels that are no positive integers, or that the groups do not divide; an unknown activation.

    Example:
        >>> y = convblocks.ConvNormAct(3, 32, 3, stride=2, activation="silu")(torch.randn(2, 3, 56, 56))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        activation: Layer = "relu",
        eps: float = 1e-5,
        momentum: float = 0.1,
        negative_slope: float = 0.01,
        names: tuple[str, str] = ("conv", "bn"),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = "ConvNormAct"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        if c % positive(name, "groups", groups) or out % groups:
            raise ValueError(f"{name}: expected groups that divide {c} and {out} channels, got {groups}")
        if padding is None:
            kernel, apart = ((v, v) if isinstance(v, int) else v for v in (kernel_size, dilation))
            padding = (apart[0] * (kernel[0] - 1) // 2, apart[1] * (kernel[1] - 1) // 2)
        depthwise = groups == c > 1
        conv = (DepthwiseConv2d if depthwise else nn.Conv2d)(
            c, out, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        norm = BatchNormAct2d(
            out,
            activation,
            eps,
            momentum,
            negative_slope=negative_slope,
            inplace=True,
            device=device,
            dtype=dtype,
        )
        super().__init__(OrderedDict(zip(names, (conv, norm), strict=True)))
