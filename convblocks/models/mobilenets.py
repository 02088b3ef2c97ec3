from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from convblocks.blocks.arguments import make_divisible
from convblocks.blocks.attention import Attention, outside_attention
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout
from convblocks.blocks.depthwise_separable_conv import DepthwiseSeparableConv
from convblocks.blocks.inverted_residual import InvertedResidual
from convblocks.models.features import FeaturesNetwork, classifier_step, pytorchcv_mobilenet_v2, timm_step
from convblocks.models.network import Network, classifier
from convblocks.models.registry import register


def check_width(network: str, width: float) -> None:
    if not width > 0:
        raise ValueError(f"{network}: expected a positive width, got {width}")


class MobileNetV1(Network):
    """MobileNet, the first: depthwise-separable convolutions.

    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", arXiv
    1704.04861. The keys of the state dict are those of timm.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        width: a factor of the channels, which are rounded to multiples of 8.
        attention: in each block, after the depthwise convolution: a name ("se", "eca", "cbam", "simam", ...), what
            makes a module for C channels, or None.
        drop_rate: of the dropout before the classifier.
        norm_eps, norm_momentum: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.mobilenet_v1(num_classes=10, attention="se")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    head_layers = ("classifier",)
    chains = (("conv_stem", "bn1"),)
    native = "timm"

    SETTINGS = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))  # channels and blocks of the stages

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        attention: Attention = None,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__(num_classes, in_channels)
        check_width("MobileNetV1", width)
        norm = partial(BatchNormAct2d, activation="relu6", eps=norm_eps, momentum=norm_momentum, inplace=True)
        block = partial(
            DepthwiseSeparableConv, attention=attention, norm_layer=norm, dw_act="none", pw_act="none"
        )  # the norms have the activations
        channels = make_divisible(32 * width)
        self.conv_stem = nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False)
        self.bn1 = norm(channels)
        blocks: list[nn.Module] = []
        for planes, count in self.SETTINGS:
            out = make_divisible(planes * width)
            first = block(channels, out, stride=2 if blocks else 1)
            blocks.append(nn.Sequential(first, *(block(out, out) for _ in range(count - 1))))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(channels, num_classes)
        self.initialise()

    def trunk(self) -> list[list[Any]]:
        first, *others = self.blocks
        return [[self.conv_stem, self.bn1, first], *([stage] for stage in others)]

    def initialise(self) -> None:
        """As the authors' code does: from a normal distribution of deviation 0.09, cut off at twice that."""
        super().initialise()
        for layer in outside_attention(self):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(layer.weight, std=0.09, a=-0.18, b=0.18)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


class MobileNetV2(FeaturesNetwork):
    """MobileNetV2: inverted residuals.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381. The keys of the state
    dict are those of torchvision; those of timm and of pytorchcv's mobilenetv2b are
    read.

    Args:
        num_classes: 0: the pooled features.
        in_channels: of the images.
        width: a factor of the channels, which are rounded to multiples of 8; the last map has no fewer for less than 1.
        attention: in each block, after the depthwise convolution: a name ("se": as MobileNetV3's), what makes a module
            for C channels, or None.
        drop_rate: of the dropout before the classifier.
        drop_path_rate: the probability with which a sample skips the last block in training, nearly; it grows from 0
            on.
        norm_eps, norm_momentum: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.mobilenet_v2(num_classes=10, width=0.5)
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    layouts = (
        Layout("timm", (classifier_step("classifier", "classifier.1"), timm_step("conv", flat=True))),
        Layout("pytorchcv", (pytorchcv_mobilenet_v2,)),
    )

    # Of the stages: the factor of the expansion, channels, blocks, and the stride of the first.
    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        attention: Attention = None,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__(num_classes, in_channels)
        check_width("MobileNetV2", width)
        norm: dict[str, Any] = {"eps": norm_eps, "momentum": norm_momentum}
        conv = partial(ConvNormAct, activation="relu6", eps=norm_eps, momentum=norm_momentum, names=("0", "1"))
        channels, last = make_divisible(32 * width), make_divisible(1280 * max(1.0, width))
        layers: list[nn.Module] = [conv(in_channels, channels, 3, 2)]
        total, starts = sum(count for _, _, count, _ in self.SETTINGS), [0]
        for expand, planes, count, stride in self.SETTINGS:
            out = make_divisible(planes * width)
            starts += [len(layers)] if stride == 2 else []
            for i in range(count):
                drop = drop_path_rate * (len(layers) - 1) / total
                own = stride if i == 0 else 1
                block = InvertedResidual(channels, out, own, expand, attention=attention, drop_path=drop, **norm)
                layers.append(block)
                channels = out
        self.starts = starts
        self.features = nn.Sequential(*layers, conv(channels, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(drop_rate), classifier(last, num_classes))
        self.initialise()


class MobileNetV3(FeaturesNetwork):
    """MobileNetV3: inverted residuals with squeeze-excite and hardswish, found by search.

    Howard et al., "Searching for MobileNetV3", arXiv 1905.02244. The keys of the state dict are those of torchvision;
    those of timm's mobilenetv3_large_100 and mobilenetv3_small_100 are read, whose norms have ``norm_eps=1e-5``.

    Args:
        settings: of each block: kernel size, expanded channels, channels, whether it has attention, activation, stride.
        hidden: channels between the two layers of the classifier.
        num_classes: 0: what the last layer of the classifier would get.
        in_channels: of the images.
        width: a factor of the channels, which are rounded to multiples of 8.
        attention: in the blocks that have it, after the depthwise convolution: a name ("se": as published), what makes
            a module for C channels, or None.
        drop_rate: of the dropout before the last layer.
        drop_path_rate: the probability with which a sample skips the last block in training, nearly; it grows from 0
            on.
        norm_eps, norm_momentum: of the norms.

    Raises:
        ValueError: numbers out of range, an unknown attention.

    Example:
        >>> model = convblocks.models.mobilenet_v3_small(num_classes=10, attention="eca")
        >>> y = model(torch.randn(2, 3, 64, 64))
    """

    layouts = (
        Layout(
            "timm",
            (
                classifier_step("classifier", "classifier.3"),
                classifier_step("conv_head", "classifier.0"),
                timm_step("block"),
            ),
        ),
    )

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, bool, str, int]],
        hidden: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        attention: Attention = "se",
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__(num_classes, in_channels)
        check_width("MobileNetV3", width)
        norm: dict[str, Any] = {"eps": norm_eps, "momentum": norm_momentum}
        conv = partial(ConvNormAct, activation="hardswish", eps=norm_eps, momentum=norm_momentum, names=("0", "1"))
        channels, hidden = make_divisible(16 * width), make_divisible(hidden * width)
        layers: list[nn.Module] = [conv(in_channels, channels, 3, 2)]
        starts = [0]
        for made, (kernel, expanded, planes, attends, activation, stride) in enumerate(settings):
            out = make_divisible(planes * width)
            starts += [len(layers)] if stride == 2 else []
            layers.append(
                InvertedResidual(
                    channels,
                    out,
                    stride,
                    expanded_channels=make_divisible(expanded * width),
                    kernel_size=kernel,
                    activation=activation,
                    attention=attention if attends else None,
                    drop_path=drop_path_rate * made / len(settings),
                    keys="v3",
                    **norm,
                )
            )
            channels = out
        self.starts = starts
        self.features = nn.Sequential(*layers, conv(channels, 6 * channels, 1))
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, hidden),
            nn.Hardswish(inplace=True),
            nn.Dropout(drop_rate),
            classifier(hidden, num_classes),
        )
        self.initialise()


_LARGE = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    (5, 960, 160, True, "hardswish", 1),
)
_SMALL = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hardswish", 2),
    (5, 240, 40, True, "hardswish", 1),
    (5, 240, 40, True, "hardswish", 1),
    (5, 120, 48, True, "hardswish", 1),
    (5, 144, 48, True, "hardswish", 1),
    (5, 288, 96, True, "hardswish", 2),
    (5, 576, 96, True, "hardswish", 1),
    (5, 576, 96, True, "hardswish", 1),
)

register(MobileNetV1, {"mobilenet_v1": {}})
register(MobileNetV2, {"mobilenet_v2": {}})
register(
    MobileNetV3,
    {
        "mobilenet_v3_large": {"settings": _LARGE, "hidden": 1280},
        "mobilenet_v3_small": {"settings": _SMALL, "hidden": 1024},
    },
)
