from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer, outside_attention
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.unet import DoubleConv, UNetDown, UNetUp
from convblocks.models.network import EncoderDecoder, SegmentationNetwork
from convblocks.models.registry import ENTRIES, register


class UNet(SegmentationNetwork):
    """U-Net: a contracting path, and an expanding one that sees each of its maps again.

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", arXiv 1505.04597: with
    ``padding="valid", norm=False, skip="crop"`` the paper's, of which an image of 572 x 572 gets 388 x 388 classes. As
    it is by default, it is milesial's Pytorch-UNet, whose keys those of the state dict are.

    Args:
        num_classes: 0: the map before the classes.
        in_channels: of the images.
        base: channels at full size; twice as many at each half.
        depth: how many times the size is halved.
        padding: "same" or "valid"; "valid" needs sizes that stay even.
        norm: whether there are batch norms.
        up, skip, skip_first: of ``UNetUp``.
        attention: in each ``DoubleConv``: a name ("scse", "se", ...), what makes a module for C channels, or None.
        drop_rate: of the dropout at the end of the contracting path.

    Shape: (N, in_channels, H, W) to (N, num_classes, H, W), smaller if "valid".

    Raises:
        ValueError: numbers out of range, unknown options, an image size that does not fit.

    Example:
        >>> model = convblocks.models.unet(num_classes=2, base=16, attention="scse")
        >>> y = model(torch.randn(1, 3, 64, 48))
    """

    head_layers = ("outc",)
    native = "official"
    layouts = (Layout("official", ()),)

    def __init__(
        self,
        num_classes: int = 2,
        in_channels: int = 3,
        *,
        base: int = 64,
        depth: int = 4,
        padding: str = "same",
        norm: bool = True,
        up: str = "transpose",
        skip: str = "pad",
        skip_first: bool = True,
        attention: Attention = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels)
        positive("UNet", "base", base)
        options: dict[str, Any] = {"padding": padding, "norm": norm, "attention": attention}
        widths = [base << i for i in range(positive("UNet", "depth", depth) + 1)]
        halves = up == "bilinear"  # without a convolution that halves the channels, the ones before make half
        made = [*widths[:-1], widths[-1] // 2] if halves else widths
        self.depth, self.valid, self.pads = depth, padding == "valid", skip == "pad"
        self.inc = DoubleConv(in_channels, base, **options)
        for i in range(depth):
            self.add_module(f"down{i + 1}", UNetDown(widths[i], made[i + 1], **options))
        self.drop = nn.Dropout(drop_rate)
        c = made[-1]
        for i in range(depth):
            beside = widths[depth - 1 - i]
            out = beside // 2 if halves and i < depth - 1 else beside
            step = UNetUp(c, beside, out, up=up, skip=skip, skip_first=skip_first, **options)
            self.add_module(f"up{i + 1}", step)
            c = out
        self.outc = nn.Sequential()
        self.outc.add_module("conv", nn.Conv2d(c, num_classes, 1) if num_classes else nn.Identity())
        self.least_size = next(n for n in count(1) if self._output(n) is not None)
        self.initialise()

    def initialise(self) -> None:
        """As the paper: by the fan in. Biases as torch has them."""
        for layer in outside_attention(self):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")

    def _output(self, size: int) -> int | None:
        """How many pixels of so many come out; None if they do not fit."""
        lost, skips = 4 if self.valid else 0, []
        for _ in range(self.depth):
            size -= lost
            skips.append(size)
            if size < 2 or (self.valid and size % 2):
                return None
            size //= 2
        size -= lost
        for skip in reversed(skips):
            if size < 1:
                return None
            size = (skip if self.pads else size * 2) - lost
        return size if size > 0 else None

    def without_head(self) -> UNet:
        for i in range(1, self.depth + 1):
            delattr(self, f"up{i}")
        super().without_head()
        return self

    def check(self, x: Tensor) -> None:
        super().check(x)
        if not self.valid or isinstance(x, torch.fx.Proxy) or isinstance(x.shape[0], Tensor):
            return
        for size in x.shape[2:]:
            if self._output(size) is None:
                following = next(n for n in count(size) if self._output(n) is not None)
                words = f"a height and width that stay even when halved, such as {following}"
                raise ValueError(f"{self.name}: expected {words}, got {size}")

    def trunk(self) -> list[list[Any]]:
        last = [getattr(self, f"down{self.depth}"), self.drop]
        return [[self.inc], *([getattr(self, f"down{i}")] for i in range(1, self.depth)), last]

    def decode(self, maps: list[Tensor], height: int, width: int) -> Tensor:
        y = maps[-1]
        for i in range(1, self.depth + 1):
            y = getattr(self, f"up{i}")(y, maps[-1 - i])
        classes: Tensor = self.outc(y)
        return classes


class _DecoderBlock(nn.Module):
    def __init__(self, channels: int, skip: int, out: int, attention: Attention) -> None:
        super().__init__()
        name = "EncoderUNet"
        self.conv1 = ConvNormAct(channels + skip, out, names=("0", "1"))
        self.attention1 = attention_layer(name, attention, channels + skip)  # idle without a skip, but in the keys
        self.conv2 = ConvNormAct(out, out, names=("0", "1"))
        self.attention2 = attention_layer(name, attention, out)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        y = F.interpolate(x, size=size, mode="nearest")
        if skip is not None:
            y = torch.cat((y, skip), 1)
            y = y if self.attention1 is None else self.attention1(y)
        y = self.conv2(self.conv1(y))
        result: Tensor = y if self.attention2 is None else self.attention2(y)
        return result


class EncoderUNet(EncoderDecoder):
    """A U-Net whose contracting path is another network: segmentation_models_pytorch's Unet.

    Ronneberger et al., arXiv 1505.04597; with attention "scse" Roy et al., "Recalibrating Fully Convolutional Networks
    with Spatial and Channel 'Squeeze & Excitation' Blocks", arXiv 1808.08127. The keys of the state dict are those of
    segmentation_models_pytorch, but for the attention's, which ``convert_state_dict`` reads.

    Args:
        encoder: the name of a network of this package that makes maps of a half, a quarter, ... of the image's size.
        num_classes: 0: the map before the classes.
        in_channels: of the images.
        decoder_channels: after each doubling of the size.
        attention: in the decoder, after each concatenation and at the end of each step: a name, what makes a module for
            C channels, or None.
        **options: of the encoder.

    Shape: (N, in_channels, H, W) to (N, num_classes, H, W).

    Raises:
        ValueError: numbers out of range, an unknown attention, an encoder that has no such maps.

    Example:
        >>> model = convblocks.models.scse_unet(encoder="resnet18", num_classes=3)
        >>> y = model(torch.randn(1, 3, 64, 96))
    """

    head_layers = ("decoder", "segmentation_head")
    encoder_name = "encoder"
    native = "convblocks"
    layouts = (Layout("segmentation_models_pytorch", (rename(r"(.*\.attention[12])\.attention\.(.+)", r"\1.\2"),)),)

    def __init__(
        self,
        encoder: str = "resnet34",
        num_classes: int = 1,
        in_channels: int = 3,
        *,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        attention: Attention = "scse",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, in_channels)
        if encoder not in ENTRIES or issubclass(ENTRIES[encoder].cls, SegmentationNetwork):
            raise ValueError(f"EncoderUNet: expected encoder to be the name of a classification network, got {encoder}")
        self.encoder = ENTRIES[encoder](in_channels=in_channels, features_only=True, **options)
        info = self.encoder.feature_info()
        if [reduction for _, reduction in info] != [2 << i for i in range(len(decoder_channels))]:
            got = ", ".join(str(reduction) for _, reduction in info)
            wanted = f"an encoder with a map of each of {len(decoder_channels)} halvings of the image"
            raise ValueError(f"EncoderUNet: expected {wanted}, got {encoder}, whose maps are reduced by {got}")
        self.least_size = self.encoder.least_size
        *skips, c = (channels for channels, _ in info)
        blocks = []
        for out, skip in zip(decoder_channels, [*reversed(skips), 0], strict=True):
            blocks.append(_DecoderBlock(c, skip, positive("EncoderUNet", "decoder_channels", out), attention))
            c = out
        self.decoder = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.segmentation_head = nn.Sequential(
            nn.Conv2d(c, num_classes, 3, padding=1) if num_classes else nn.Identity()
        )

    def decode(self, maps: list[Tensor], height: int, width: int) -> Tensor:
        y = maps[-1]
        blocks: Any = self.decoder["blocks"]
        for i, block in enumerate(blocks):
            skip = maps[-2 - i] if i < len(maps) - 1 else None
            y = block(y, skip, (height, width) if skip is None else (skip.shape[2], skip.shape[3]))
        classes: Tensor = self.segmentation_head(y)
        return classes


register(UNet, {"unet": {"num_classes": 2}}, image_size=256)
register(EncoderUNet, {"scse_unet": {"num_classes": 1}}, image_size=256)
