from __future__ import annotations

from torch import nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.fused import Layers


class VGGBlock(Layers):
    """VGG's block: 3x3 convolutions, each with a ReLU, then a pool that halves height and width.

    ``maxpool(se(relu(conv(... relu(conv(x))))))``, with a norm after each convolution where asked for. Simonyan and
    Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv 1409.1556. The keys of the
    state dict are numbers, as in torchvision's ``features``, whose layers those of several blocks in a row are.

    Args:
        in_channels, out_channels: of the input and of all convolutions.
        layers: how many convolutions.
        norm: puts a batch norm after each.
        bias: whether the convolutions have one.
        attention: before the pool: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or
            None.

    Shape: (N, in_channels, H, W) to (N, out_channels, H / 2, W / 2), rounded down.

    Raises:
        ValueError: numbers that are no positive integers, an unknown attention.

    Example:
        >>> y = convblocks.VGGBlock(64, 128, 2, norm=True, attention="se")(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int = 2,
        *,
        norm: bool = False,
        bias: bool = True,
        attention: Attention = None,
    ) -> None:
        super().__init__()
        name = "VGGBlock"
        c, out = positive(name, "in_channels", in_channels), positive(name, "out_channels", out_channels)
        for _ in range(positive(name, "layers", layers)):
            self.append(nn.Conv2d(c, out, 3, padding=1, bias=bias))
            if norm:
                self.append(BatchNormAct2d(out, "relu", inplace=True))
                self.append(nn.Identity())  # torchvision counts the activation
            else:
                self.append(nn.ReLU(inplace=True))
            c = out
        after = len(self)
        attended = attention_layer(name, attention, out)
        if attended is not None:
            self.add_module("se", attended)
        self.add_module(str(after), nn.MaxPool2d(2, 2))
