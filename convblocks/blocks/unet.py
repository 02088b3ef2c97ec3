from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.fused import Layers
from convblocks.ops.checks import one_of

UPS = ("transpose", "bilinear", "nearest")


def centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of a map; where it is cut unevenly, more goes below and to the right."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


class DoubleConv(nn.Module):
    """U-Net's two 3x3 convolutions, each with a norm, or a bias, and ReLU.

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv 1505.04597. The keys of
    the state dict (``double_conv``) are those of milesial's Pytorch-UNet.

    Args:
        in_channels, out_channels: of the input and of the result.
        mid_channels: between the two; out_channels if None.
        padding: "same", or "valid": each convolution takes a pixel off each side.
        norm: whether batch norms follow the convolutions; they have a bias where not.
        attention: on the result: a name ("scse", "se", ...), what makes a module for C channels, or None.

    Shape: (N, in_channels, H, W) to (N, out_channels, H, W); four pixels less each way if "valid".

    Raises:
        ValueError: channels that are no positive integers, an unknown padding or attention.

    Example:
        >>> y = convblocks.DoubleConv(3, 64, attention="scse")(torch.randn(2, 3, 32, 32))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int | None = None,
        *,
        padding: str = "same",
        norm: bool = True,
        attention: Attention = None,
    ) -> None:
        super().__init__()
        name = "DoubleConv"
        one_of(name, "padding", padding, ("same", "valid"))
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        mid = out if mid_channels is None else positive(name, "mid_channels", mid_channels)
        layers: list[nn.Module] = []
        for to in (mid, out):
            layers.append(nn.Conv2d(c, to, 3, padding=int(padding == "same"), bias=not norm))
            layers.append(BatchNormAct2d(to, "relu", inplace=True) if norm else nn.ReLU(inplace=True))
            layers.append(nn.Identity())  # where others have the ReLU
            c = to
        self.double_conv = Layers(*layers)
        self.se = attention_layer(name, attention, out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.double_conv(x)
        return y if self.se is None else self.se(y)


class UNetDown(nn.Module):
    """A step of U-Net's contracting path: the maxima of 2x2 pixels, then a ``DoubleConv``.

    Ronneberger et al., arXiv 1505.04597. The keys of the state dict (``maxpool_conv``) are those of milesial's
    Pytorch-UNet.

    Args:
        in_channels, out_channels, padding, norm, attention: of ``DoubleConv``.

    Shape: (N, in_channels, H, W) to (N, out_channels, H // 2, W // 2); four pixels less each way if "valid".

    Example:
        >>> y = convblocks.UNetDown(64, 128)(torch.randn(2, 64, 32, 32))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding: str = "same",
        norm: bool = True,
        attention: Attention = None,
    ) -> None:
        super().__init__()
        conv = DoubleConv(in_channels, out_channels, padding=padding, norm=norm, attention=attention)
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), conv)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.maxpool_conv(x)
        return y


class UNetUp(nn.Module):
    """A step of U-Net's expanding path: twice the size, the contracting path's map beside it, then a ``DoubleConv``.

    Ronneberger et al., arXiv 1505.04597. The keys of the state dict (``up``, ``conv``) are those of milesial's
    Pytorch-UNet.

    Args:
        in_channels, skip_channels, out_channels: of the input, of the contracting path's map and of the result.
        up: "transpose": a 2x2 transposed convolution to skip_channels; "bilinear": no convolution, and half of the
            channels between the two that follow; "nearest": and a 1x1 convolution to skip_channels.
        skip: where the two maps differ in size, "pad": zeros round the enlarged one; "crop": the middle of the other.
        skip_first: the contracting path's map comes first in the concatenation.
        padding, norm, attention: of ``DoubleConv``.

    Shape: (N, in_channels, H, W) and (N, skip_channels, H', W') to (N, out_channels, H'', W''): the size of the second
    if "pad", 2H x 2W if "crop"; four pixels less each way if "valid".

    Raises:
        ValueError: an unknown up, skip, padding or attention; a map to crop that is smaller than what it is cropped to.

    Example:
        >>> y = convblocks.UNetUp(128, 64, 64)(torch.randn(2, 128, 16, 16), torch.randn(2, 64, 33, 32))
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        *,
        up: str = "transpose",
        skip: str = "pad",
        skip_first: bool = True,
        padding: str = "same",
        norm: bool = True,
        attention: Attention = None,
    ) -> None:
        super().__init__()
        one_of("UNetUp", "up", up, UPS)
        one_of("UNetUp", "skip", skip, ("pad", "crop"))
        c, beside = positive("UNetUp", "in_channels", in_channels), positive("UNetUp", "skip_channels", skip_channels)
        self.crops, self.skip_first = skip == "crop", skip_first
        enlarged, mid = beside, None
        if up == "transpose":
            self.up: nn.Module = nn.ConvTranspose2d(c, beside, 2, 2)
        elif up == "nearest":
            self.up = Layers(nn.Upsample(scale_factor=2), nn.Conv2d(c, beside, 1))
        else:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            enlarged, mid = c, (c + beside) // 2
        self.conv = DoubleConv(beside + enlarged, out_channels, mid, padding=padding, norm=norm, attention=attention)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.up(x)
        down, right = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
        if self.crops:
            if down < 0 or right < 0:
                sizes = f"at least {list(y.shape[2:])}, got {list(skip.shape[2:])}"
                raise ValueError(f"UNetUp: expected a map to crop of {sizes}")
            skip = centre_crop(skip, y.shape[2], y.shape[3])
        elif isinstance(y, torch.fx.Proxy) or down or right:
            y = F.pad(y, (right // 2, right - right // 2, down // 2, down - down // 2))
        z: Tensor = self.conv(torch.cat((skip, y) if self.skip_first else (y, skip), 1))
        return z
