from __future__ import annotations

from typing import Any

from torch import nn

from convblocks.blocks.attention import Attention
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.xception import XceptionBlock, xception_conv
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register

# The channels that come in and go out, how many convolutions, and the stride of each block.
_BLOCKS = ((64, 128, 2, 2), (128, 256, 2, 2), (256, 728, 2, 2), *((728, 728, 3, 1),) * 8, (728, 1024, 2, 2))


class Xception(Network):
    """Xception: depthwise-separable convolutions with shortcuts.

    Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", arXiv 1610.02357. The keys of the state
    dict are those of timm's legacy_xception.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: at the end of each block's branch: a name ("se", "eca", "cbam", "simam", ...), what makes a module
            for C channels, or None.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block's branch in training; it grows from 0
            on.
        norm_eps: of the norms: 1e-5, or 1e-3 for weights from Keras.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.xception(num_classes=10, attention="se")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    least_size = 7
    head_layers = ("fc",)
    native = "timm"
    layouts = (Layout("official", (rename(r"last_linear\.(.+)", r"fc.\1"),)),)  # Cadene's, from which timm's came

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = None,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(num_classes, in_channels)
        self.conv1 = nn.Conv2d(in_channels, 32, 3, 2, bias=False)
        self.bn1 = BatchNormAct2d(32, "relu", norm_eps, inplace=True)
        self.conv2 = nn.Conv2d(32, 64, 3, bias=False)
        self.bn2 = BatchNormAct2d(64, "relu", norm_eps, inplace=True)
        last = len(_BLOCKS) - 1
        for i, numbers in enumerate(_BLOCKS):
            block = XceptionBlock(
                *numbers,
                start_with_relu=i > 0,
                grow_first=i < last,
                attention=attention,
                drop_path=drop_path_rate * i / last,
                norm_eps=norm_eps,
            )
            self.add_module(f"block{i + 1}", block)
        self.conv3 = xception_conv(1024, 1536)
        self.bn3 = BatchNormAct2d(1536, "relu", norm_eps, inplace=True)
        self.conv4 = xception_conv(1536, 2048)
        self.bn4 = BatchNormAct2d(2048, "relu", norm_eps, inplace=True)
        self.drop = nn.Dropout(drop_rate)
        self.fc = classifier(2048, num_classes)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        s, blocks = self, [getattr(self, f"block{i + 1}") for i in range(len(_BLOCKS))]
        return [
            [s.conv1, s.bn1, s.conv2, s.bn2],
            [blocks[0]],
            [blocks[1]],
            blocks[2:-1],
            [blocks[-1], s.conv3, s.bn3, s.conv4, s.bn4],
        ]


register(Xception, {"xception": {}}, image_size=299)
