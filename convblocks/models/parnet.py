from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from convblocks.blocks.attention import Attention
from convblocks.blocks.parnet import ParNetBlock, ParNetFusion
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


class ParNet(Network):
    """ParNet: three streams of blocks, each at its own resolution, which could run side by side, and their fusion.

    Goyal et al., "Non-deep Networks", arXiv 2110.07641. The keys of the state dict are those of the authors. The maps
    of ``features_only`` are those of the streams and of their fusion.

    Args:
        widths: channels of each stream, and of the last map.
        layers: how many blocks each stream has.
        num_classes: 0: the pooled features.
        in_channels: of the images.
        attention: in each block: "se": the authors' skip squeeze-excite; any other name ("eca", "cbam", "simam", ...),
            what makes a module for C channels, or None in its place.
        drop_rate: of the dropout before the classifier; the two larger networks have the authors', 0.1.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.parnet_s(num_classes=10).eval().fuse()
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("head",)
    native = "official"

    def __init__(
        self,
        widths: Sequence[int] = (92, 192, 384, 1280),
        layers: Sequence[int] = (4, 5, 5),
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        attention: Attention = "se",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)

        def block(channels: int, out: int, stride: int = 1, groups: int = 1) -> nn.Module:
            return nn.Sequential(OrderedDict(block=ParNetBlock(channels, out, stride, groups, attention=attention)))

        def fusion(channels: int, out: int, stride: int) -> nn.Sequential:
            shuffled = nn.Identity()  # within the fusion; the authors have a layer for it
            return nn.Sequential(ParNetFusion(channels), shuffled, block(2 * channels, out, stride, 2))

        *planes, last = widths
        first = min(64, planes[0])
        pairs = list(pairwise(planes))
        self.inits = nn.ModuleList([nn.Sequential(block(in_channels, first, 2), block(first, planes[0], 2))])
        self.inits.extend(block(c, out, 2) for c, out in pairs)
        self.streams = nn.ModuleList(
            nn.Sequential(*(block(c, c) for _ in range(count))) for c, count in zip(planes, layers, strict=True)
        )
        self.downsamples_2 = nn.ModuleList(
            fusion(c, out, 2) if i else block(c, out, 2) for i, (c, out) in enumerate(pairs)
        )
        self.combine = fusion(planes[-1], planes[-1], 1).append(block(planes[-1], last, 2))
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Sequential(
            OrderedDict(fc=classifier(last, num_classes))
        )  # all layers start as torch's, as the authors'

    def trunk(self) -> list[list[Any]]:
        after = [*self.downsamples_2, self.combine]
        return [[*layers] for layers in zip(self.inits, self.streams, strict=True)] + [after]

    def maps(self, x: Tensor) -> list[Tensor]:
        self.check(x)
        x = self.arranged(x)
        maps: list[Tensor] = []
        fused: Tensor | None = None
        for init, stream, fuse in zip(self.inits, self.streams, [*self.downsamples_2, self.combine], strict=True):
            x = init(x)
            maps.append(stream(x))
            fused = fuse(maps[-1] if fused is None else (maps[-1], fused))
        assert fused is not None
        return [*maps, fused]

    def last_map(self, x: Tensor) -> Tensor:
        return self.maps(x)[-1]

    def fuse(self) -> ParNet:
        """Makes one convolution of the two in each block, as they are in evaluation: ``ParNetBlock.fuse``."""
        for layer in self.modules():
            if isinstance(layer, ParNetBlock):
                layer.fuse()
        return self


register(
    ParNet,
    {
        "parnet_s": {"widths": (92, 192, 384, 1280)},
        "parnet_m": {"widths": (128, 256, 512, 2048)},
        "parnet_l": {"widths": (160, 320, 640, 2560), "drop_rate": 0.1},
        "parnet_xl": {"widths": (200, 400, 800, 3200), "drop_rate": 0.1},
    },
)
