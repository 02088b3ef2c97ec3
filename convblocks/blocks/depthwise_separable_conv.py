from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name, positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d, Pair
from convblocks.blocks.fused import convolve
from convblocks.ops.gate import ACTIVATIONS


class DepthwiseSeparableConv(nn.Module):
    """A depthwise convolution, which mixes pixels, then a pointwise one, which mixes channels.

    ``y = act(bn2(conv_pw(se(act(bn1(conv_dw(x)))))))``, each norm, activation and attention where asked for. Howard et
    al., "MobileNets", arXiv 1704.04861; Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions",
    arXiv 1610.02357.

    The flavours: MobileNetV1 as it is here by default; Xception ``dw_norm=False, dw_act="none", pw_norm=False,
    pw_act="none"`` (its norm stands outside); aligned Xception (DeepLab) and timm's SeparableConvNormAct by the same
    switches. The keys of the state dict (``conv_dw``, ``bn1``, ``conv_pw``, ``bn2``) are those of timm's
    DepthwiseSeparableConv; ``convert_state_dict`` reads those of Xception, of aligned Xception and of others.

    Args:
        in_channels, out_channels: channels of the input and of the result.
        kernel_size, stride, dilation: of the depthwise convolution.
        padding: likewise; "same" (TensorFlow's) or numbers. When left out, the size stays but for the stride.
        depth_multiplier: filters for each channel of the input.
        bias: whether the convolutions have one.
        dw_norm, pw_norm: whether a norm follows the depthwise, and the pointwise convolution.
        dw_act, pw_act: the activations there: a name, a module, or a class or partial that makes one.
        norm_layer: makes a norm of so many channels.
        attention: after the depthwise convolution: a name ("se", "eca", "cbam", "simam", ...), what makes a module for
            C channels, or None.
        skip: adds the input where stride and channels allow (timm's ``noskip=False``).
        device, dtype: of the parameters.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W').

    Raises:
        ValueError: channels or a multiplier that are no positive integers, an unknown activation or attention.

    Example:
        >>> y = convblocks.DepthwiseSeparableConv(32, 64, stride=2)(torch.randn(2, 32, 56, 56))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        *,
        depth_multiplier: int = 1,
        bias: bool = False,
        dw_norm: bool = True,
        dw_act: Layer = "relu6",
        pw_norm: bool = True,
        pw_act: Layer = "relu6",
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attention: Attention = None,
        skip: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "DepthwiseSeparableConv"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        width = c * positive(name, "depth_multiplier", depth_multiplier)
        self.dw_act, self.pw_act = (
            function_name(name, keyword, act, ACTIVATIONS) for keyword, act in (("dw_act", dw_act), ("pw_act", pw_act))
        )
        if padding is None:
            kernel, apart = ((v, v) if isinstance(v, int) else v for v in (kernel_size, dilation))
            padding = (apart[0] * (kernel[0] - 1) // 2, apart[1] * (kernel[1] - 1) // 2)
        self.conv_dw = DepthwiseConv2d(
            c,
            width,
            kernel_size,
            stride,
            padding,
            dilation,
            bias=bias,
            device=device,
            dtype=dtype,
            activation="none" if dw_norm else self.dw_act,
        )
        self.bn1 = norm_layer(width, device=device, dtype=dtype) if dw_norm else nn.Identity()
        self.se = attention_layer(name, attention, width)
        self.conv_pw = nn.Conv2d(width, out, 1, bias=bias, device=device, dtype=dtype)
        self.bn2 = norm_layer(out, device=device, dtype=dtype) if pw_norm else nn.Identity()
        self.skip = skip and c == out and self.conv_dw.stride == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.bn1, nn.Identity):
            y = self.conv_dw(x)
        else:
            y = convolve(self.conv_dw, x, self.bn1, activation=self.dw_act)
        if self.se is not None:
            y = self.se(y)
        y = convolve(self.conv_pw, y, None if isinstance(self.bn2, nn.Identity) else self.bn2, activation=self.pw_act)
        return x + y if self.skip else y

    def extra_repr(self) -> str:
        return f"dw_act={self.dw_act}, pw_act={self.pw_act}" + (", skip=True" if self.skip else "")
