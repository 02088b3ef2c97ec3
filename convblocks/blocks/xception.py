from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.depthwise_conv2d import DepthwiseConv2d
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import Layers, convolve, run_layers
from convblocks.blocks.layers import is_plain


def xception_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """A depthwise-separable convolution with nothing between its two, under the names of timm's."""
    depthwise = DepthwiseConv2d(in_channels, in_channels, 3, padding=1, bias=False)
    return Layers(OrderedDict(conv1=depthwise, pointwise=nn.Conv2d(in_channels, out_channels, 1, bias=False)))


class XceptionBlock(nn.Module):
    """Xception's block: depthwise-separable convolutions, each after a ReLU and before a norm, and a shortcut.

    ``se(maxpool(bn(conv(relu(... bn(conv(relu(x)))))))) + skipbn(skip(x))``, without the pool where the stride is 1 and
    with x itself as the shortcut where the channels stay, too. Chollet, "Xception: Deep Learning with Depthwise
    Separable Convolutions", arXiv 1610.02357. The keys of the state dict are those of timm's legacy_xception.

    Args:
        in_channels, out_channels: of the input and of the result.
        layers: how many convolutions.
        stride: of the pool and of the shortcut.
        start_with_relu: whether a ReLU goes before the first convolution.
        grow_first: whether the first convolution changes the channels, or the last.
        attention: at the end of the branch: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C
            channels, or None.
        drop_path: the probability with which a sample skips the branch in training.
        norm_eps: of the norms: 1e-5, or 1e-3 for weights from Keras.

    Shape: (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> y = convblocks.XceptionBlock(128, 256, 2, stride=2, attention="eca")(torch.randn(2, 128, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int = 3,
        stride: int = 1,
        *,
        start_with_relu: bool = True,
        grow_first: bool = True,
        attention: Attention = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        name = "XceptionBlock"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        last, stride = positive(name, "layers", layers) - 1, positive(name, "stride", stride)
        self.skip = nn.Conv2d(c, out, 1, stride, bias=False) if c != out or stride > 1 else None
        self.skipbn = None if self.skip is None else BatchNormAct2d(out, eps=norm_eps)
        self.rep = Layers()
        if start_with_relu:
            self.rep.append(nn.ReLU())  # not in place: the shortcut takes the input as it is
        for i in range(layers):
            width = out if grow_first or i == last else c
            self.rep.append(xception_conv(c, width))
            self.rep.append(BatchNormAct2d(width, "relu" if i < last else "none", norm_eps, inplace=True))
            if i < last:
                self.rep.append(nn.Identity())  # timm counts the ReLU
            c = width
        if stride > 1:
            self.rep.append(nn.MaxPool2d(3, stride, 1))
        self.se = attention_layer(name, attention, out)
        self.drop_path = check_drop_path(name, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.skip is None and self.se is None and self.drop_path == 0 and is_plain(self.rep, Layers):
            fused: Tensor = run_layers(self.rep, x, x)
            return fused
        y = self.rep(x)
        y = drop_path(y if self.se is None else self.se(y), self.drop_path, self.training)
        return x + y if self.skip is None or self.skipbn is None else convolve(self.skip, x, self.skipbn, y)
