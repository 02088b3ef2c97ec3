from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.aspp import ASPP
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.models.network import EncoderDecoder
from convblocks.models.registry import ENTRIES, register


def _head(channels: int, inner: int, num_classes: int, drop_rate: float) -> list[nn.Module]:
    """A 3x3 convolution, and classes of each pixel; the layers have the places that they have in torchvision."""
    dropout: list[nn.Module] = [nn.Dropout(drop_rate)] if drop_rate else []
    last = nn.Conv2d(inner, num_classes, 1) if num_classes else nn.Identity()
    conv, norm = ConvNormAct(channels, inner, 3)
    return [conv, norm, nn.Identity(), *dropout, last]


class DeepLabV3(EncoderDecoder):
    """DeepLabv3: a dilated ResNet, atrous spatial pyramid pooling, and classes of each pixel.

    Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv 1706.05587. The keys of the
    state dict are those of torchvision.

    Args:
        backbone: the name of a network of the class ResNet.
        num_classes: 0: the map before the classes.
        in_channels: of the images.
        output_stride: how many pixels of the image, each way, one of the map stands for: 8 or 16.
        atrous_rates: of ``ASPP``; (12, 24, 36) if None, half of these for an output stride of 16.
        dropout: of ``ASPP``.
        aux: a second head, on the map of the third stage. In training the result is then a dict of "out" and "aux".
        **options: of the backbone, such as ``attention``.

    Shape: (N, in_channels, H, W) to (N, num_classes, H, W).

    Raises:
        ValueError: numbers out of range, an unknown backbone or attention.

    Example:
        >>> model = convblocks.models.deeplabv3_resnet50(num_classes=5).eval()
        >>> y = model(torch.randn(1, 3, 65, 65))
    """

    head_layers = ("classifier", "aux_classifier")
    encoder_name = "backbone"
    native = "torchvision"

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        output_stride: int = 8,
        atrous_rates: Sequence[int] | None = None,
        dropout: float = 0.5,
        aux: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if output_stride not in (8, 16):
            raise ValueError(f"DeepLabV3: expected an output_stride of 8 or 16, got {output_stride}")
        resnets = [name for name, entry in ENTRIES.items() if "block" in entry.options]
        if backbone not in resnets:
            raise ValueError(f"DeepLabV3: expected backbone to be one of {', '.join(resnets)}, got {backbone}")
        dilated = (False, output_stride == 8, True)
        self.backbone = ENTRIES[backbone](in_channels=in_channels, dilated=dilated, features_only=True, **options)
        channels = [c for c, _ in self.backbone.feature_info()]
        rates = tuple(r * 8 // output_stride for r in (12, 24, 36)) if atrous_rates is None else atrous_rates
        self.classifier = nn.Sequential(
            ASPP(channels[-1], rates, dropout=dropout), *_head(256, 256, num_classes, drop_rate=0.0)
        )
        inner = channels[-2] // 4
        self.aux_classifier = nn.Sequential(*_head(channels[-2], inner, num_classes, drop_rate=0.1)) if aux else None

    def decode(self, maps: list[Tensor], height: int, width: int) -> Any:
        def enlarged(y: Tensor) -> Tensor:
            return F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)

        out = enlarged(self.classifier(maps[-1]))
        if self.aux_classifier is None or not self.training:
            return out
        return {"out": out, "aux": enlarged(self.aux_classifier(maps[-2]))}


register(
    DeepLabV3,
    {f"deeplabv3_resnet{d}": {"backbone": f"resnet{d}", "num_classes": 21} for d in (50, 101)},
    image_size=520,
)
