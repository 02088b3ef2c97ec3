from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.fused import convolve, of_inference, put, runs_alone
from convblocks.blocks.layers import is_plain
from convblocks.ops.operator import memory_format


class DenseLayer(nn.Module):
    """DenseNet's layer: what it adds to the channels that came before.

    ``drop(se(conv2(relu(norm2(conv1(relu(norm1(x))))))))``, a 1x1 and a 3x3 convolution. Huang et al., "Densely
    Connected Convolutional Networks", arXiv 1608.06993. The keys of the state dict are those of torchvision and timm.

    Args:
        in_channels: all channels that came before.
        growth_rate: channels that it adds, k.
        bn_size: the 1x1 convolution makes bn_size * k channels; 0: there is none ("without B").
        attention: of what it adds: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or
            None.
        drop_rate: of the dropout of what it adds.

    Shape: (N, in_channels, H, W) to (N, growth_rate, H, W).

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> new = convblocks.DenseLayer(64, 32)(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int = 32,
        bn_size: int = 4,
        *,
        attention: Attention = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        name = "DenseLayer"
        c, k = positive(name, "in_channels", in_channels), positive(name, "growth_rate", growth_rate)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"{name}: expected drop_rate from 0 to below 1, got {drop_rate}")
        self.norm1 = BatchNormAct2d(c, "relu")
        self.reduces = bn_size != 0
        if self.reduces:
            hidden = positive(name, "bn_size", bn_size) * k
            self.conv1 = nn.Conv2d(c, hidden, 1, bias=False)
            self.norm2 = BatchNormAct2d(hidden, "relu", inplace=True)
            self.conv2 = nn.Conv2d(hidden, k, 3, 1, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(c, k, 3, 1, 1, bias=False)
        self.se = attention_layer(name, attention, k)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Inference may leave the result in ``out``, the part of a map."""
        y: Tensor = self.norm1(x)
        last, y = (self.conv2, convolve(self.conv1, y, self.norm2)) if self.reduces else (self.conv1, y)
        y = convolve(last, y, out=out)
        y = y if self.se is None else self.se(y)
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate else y

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}" if self.drop_rate else ""


class DenseBlock(nn.Module):
    """DenseNet's block: layers that each see the channels of all before, and add some.

    ``x = cat(x, layer(x))`` for each ``DenseLayer``. At inference they write into one map that has room for all, where
    training copies what came before for each. Huang et al., "Densely Connected Convolutional Networks",
    arXiv 1608.06993. The keys of the state dict are those of torchvision and timm.

    Args:
        in_channels: of the input.
        layers: how many.
        growth_rate: channels that each adds, k.
        bn_size, attention, drop_rate: of ``DenseLayer``.

    Shape: (N, in_channels, H, W) to (N, in_channels + layers * growth_rate, H, W).

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> y = convblocks.DenseBlock(64, layers=6)(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        layers: int,
        growth_rate: int = 32,
        bn_size: int = 4,
        *,
        attention: Attention = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels = positive("DenseBlock", "in_channels", in_channels)
        for i in range(positive("DenseBlock", "layers", layers)):
            layer = DenseLayer(
                in_channels + i * growth_rate, growth_rate, bn_size, attention=attention, drop_rate=drop_rate
            )
            self.add_module(f"denselayer{i + 1}", layer)
        self.growth_rate, self.out_channels = growth_rate, in_channels + layers * growth_rate

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self._modules.values())
        return self._into_one_map(x, layers) if of_inference(x) else self._concatenated(x, layers)

    @staticmethod
    def _concatenated(x: Tensor, layers: Sequence[Any]) -> Tensor:
        for layer in layers:
            x = torch.cat((x, layer(x)), 1)
        return x

    def _into_one_map(self, x: Tensor, layers: Sequence[Any]) -> Tensor:
        n, c, h, w = x.shape
        alone = runs_alone(x)
        if memory_format(x) == torch.channels_last:
            y = x.new_empty(n, h, w, self.out_channels).permute(0, 3, 1, 2)
        else:
            y = x.new_empty(n, self.out_channels, h, w)
        y[:, :c] = x
        for i, layer in enumerate(layers):
            before, out = y[:, :c], y[:, c : c + self.growth_rate]
            new = layer(before, out=out) if alone and is_plain(layer, DenseLayer) else layer(before)
            if new.shape != out.shape or new.dtype != out.dtype:  # a layer of another width
                return self._concatenated(torch.cat((before, new), 1), layers[i + 1 :])
            put(new, out) if alone else out.copy_(new)
            c += self.growth_rate
        return y


class Transition(nn.Module):
    """DenseNet's transition between blocks: fewer channels, half the size.

    ``avg_pool(conv(relu(norm(x))))``. At inference the pooling goes before the 1x1 convolution, which has then a
    quarter of the work: the two commute. Huang et al., "Densely Connected Convolutional Networks", arXiv 1608.06993.
    The keys of the state dict are those of torchvision and timm.

    Args:
        in_channels: of the input.
        out_channels: of the result; half of in_channels when left out.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / 2 and W / 2 rounded down.

    Raises:
        ValueError: channels that are no positive integers.

    Example:
        >>> y = convblocks.Transition(256)(torch.randn(2, 256, 28, 28))
    """

    def __init__(self, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        c = positive("Transition", "in_channels", in_channels)
        out = positive("Transition", "out_channels", c // 2 if out_channels is None else out_channels)
        self.norm = BatchNormAct2d(c, "relu")
        self.conv = nn.Conv2d(c, out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        conv: Any = self.conv
        linear = is_plain(conv, nn.Conv2d) and conv.kernel_size == conv.stride == (1, 1) and conv.bias is None
        if linear and conv.padding == (0, 0) and is_plain(self.pool, nn.AvgPool2d) and of_inference(x):
            return convolve(conv, self.pool(y))
        then: Tensor = self.pool(conv(y))
        return then
