from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks import backends
from convblocks.blocks.arguments import positive
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.fused import Layers, Room, run_into
from convblocks.blocks.layers import is_plain


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 convolution, dilated ones of several rates and the mean of the whole map.

    ``project(cat(convs[0](x), ..., upsample(convs[-1](mean(x)))))``, each branch with norm and ReLU. At inference the
    pooled branch, which is the same in all pixels, is a bias of the projection instead of a part of the concatenation.
    Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv 1706.05587; separable in Chen et
    al., "Encoder-Decoder with Atrous Separable Convolution", arXiv 1802.02611.

    The keys of the state dict are those of torchvision and of segmentation_models_pytorch.

    Args:
        in_channels: of the input.
        atrous_rates: a dilation for each 3x3 convolution: (12, 24, 36) where the map is an eighth of the image,
            (6, 12, 18) where it is a sixteenth.
        out_channels: of each branch and of the result.
        separable: the dilated convolutions are depthwise ones with a pointwise one after them.
        dropout: the rate after the projection.

    Shape: (N, in_channels, H, W) to (N, out_channels, H, W). In training more than one sample is needed, for the norm
    of the pooled branch.

    Raises:
        ValueError: channels or rates that are no positive integers.

    Example:
        >>> y = convblocks.ASPP(64, (6, 12, 18)).eval()(torch.randn(2, 64, 33, 33))
    """

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int] = (12, 24, 36),
        out_channels: int = 256,
        *,
        separable: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        c, out = positive("ASPP", "in_channels", in_channels), positive("ASPP", "out_channels", out_channels)
        self.width = out
        branches: list[nn.Module] = [ConvNormAct(c, out, 1, names=("0", "1"))]
        for rate in atrous_rates:
            positive("ASPP", "each of atrous_rates", rate)
            if separable:
                depthwise = DepthwiseConv2d(c, c, 3, 1, rate, rate, bias=False)
                conv = Layers(depthwise, nn.Conv2d(c, out, 1, bias=False))
                branches.append(Layers(conv, BatchNormAct2d(out, "relu", inplace=True)))
            else:
                branches.append(ConvNormAct(c, out, 3, dilation=rate, names=("0", "1")))
        branches.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *ConvNormAct(c, out, 1)))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(*ConvNormAct(len(branches) * out, out, 1), nn.Identity(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        *convs, pool = self.convs
        conv: Any = self.project[0]
        room = Room(x, [self.width] * len(convs))
        branches = [run_into(branch, x, out) for branch, out in zip(convs, room.parts, strict=True)]
        pooled = pool(x)
        eager = torch.is_grad_enabled() or backends.selected == "reference" or isinstance(x, torch.fx.Proxy)
        if self.training or eager or not (is_plain(conv, nn.Conv2d) and is_plain(self.project, nn.Sequential)):
            branches.append(pooled.expand(-1, -1, x.shape[2], x.shape[3]))
            projected: Tensor = self.project(torch.cat(branches, 1))
            return projected
        y = room.filled(branches)
        own, of_pooled = conv.weight.split((y.shape[1], pooled.shape[1]), 1)
        y = F.conv2d(y, own).add_(F.conv2d(pooled, of_pooled))
        normalised: Tensor = self.project[1:](y)
        return normalised
