from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import make_divisible
from convblocks.blocks.attention import Attention
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, bottleneck
from convblocks.blocks.ghost import GhostBottleneck
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register

# Of each block: kernel, channels between its modules and after it, whether it has attention, stride. A list for each
# number of the keys.
_BLOCKS = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    (
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
    ),
    ((5, 672, 160, True, 2),),
    ((5, 960, 160, False, 1), (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1)),
)


class GhostNet(Network):
    """GhostNet, and GhostNetV2 with its attention over rows and columns.

    Han et al., "GhostNet: More Features from Cheap Operations", arXiv 1911.11907; Tang et al., "GhostNetV2: Enhance
    Cheap Operation with Long-Range Attention", arXiv 2211.12905. The keys of the state dict are those of the authors
    and of timm, but for the two layers of the squeeze-excite, which ``convert_state_dict`` reads.

    Args:
        width: factor of all channels but the 1280 of the last layer, which are rounded to multiples of 4: the published
            networks have 0.5, 1 and 1.3 (V2: 1, 1.3 and 1.6).
        num_classes: 0: the pooled features, 1280.
        in_channels: of the images.
        attention: in the blocks that have squeeze-excite: "se", which is that, another name ("eca", "cbam", ...), what
            makes a module for C channels, or None.
        decoupled: whether the blocks but the first two have V2's attention in their first module. Such a network needs
            images of at least 33 pixels.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training; it grows from 0 on.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.ghostnet(width=0.5, num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("conv_head", "classifier")
    chains = (("conv_stem", "bn1"),)
    native = "convblocks"
    layouts = (Layout("official", (bottleneck("conv_reduce", "conv_expand"),)),)

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        attention: Attention = "se",
        decoupled: bool = False,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if not width > 0:
            raise ValueError(f"GhostNet: expected a width above 0, got {width}")

        def scaled(channels: int) -> int:
            return make_divisible(channels * width, 4)

        c = scaled(16)
        self.conv_stem = nn.Conv2d(in_channels, c, 3, 2, 1, bias=False)
        self.bn1 = BatchNormAct2d(c, "relu", inplace=True)
        made, total = 0, sum(map(len, _BLOCKS))
        parts = []
        for part in _BLOCKS:
            blocks = []
            for kernel, mid, out, attends, stride in part:
                block = GhostBottleneck(
                    c,
                    scaled(mid),
                    scaled(out),
                    kernel,
                    stride,
                    attention=attention if attends else None,
                    decoupled=decoupled and made > 1,
                    drop_path=drop_path_rate * made / (total - 1),
                )
                blocks.append(block)
                c, made = scaled(out), made + 1
            parts.append(nn.Sequential(*blocks))
        last = scaled(_BLOCKS[-1][-1][1])
        parts.append(nn.Sequential(ConvNormAct(c, last, 1, names=("conv", "bn1"))))
        self.blocks = nn.Sequential(*parts)
        self.conv_head = nn.Conv2d(last, 1280, 1)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(1280, num_classes)
        self.least_size = 33 if decoupled else 1  # the last map is halved once more
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        b = self.blocks
        return [[self.conv_stem, self.bn1, b[0]], list(b[1:3]), list(b[3:5]), list(b[5:7]), list(b[7:])]

    def forward_head(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1)))
        y: Tensor = self.classifier(self.drop(x.flatten(1)))
        return y


register(GhostNet, {"ghostnet": {}, "ghostnetv2": {"decoupled": True}})
