from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.fused import Room, convolve
from convblocks.blocks.resnet import ResidualBlock


class Res2NetBottleneck(ResidualBlock):
    """Res2Net's block: a bottleneck whose 3x3 convolution is several, in a row, each of a part of the channels.

    ``relu(se(bn3(conv3(cat(y_1, ..., y_s)))) + downsample(x))``, where ``x_1, ..., x_s`` are the parts of
    ``relu(bn1(conv1(x)))``, ``y_i = relu(bn(conv(x_i + y_(i-1))))`` and ``y_s = x_s``. The "stage" kind, which begins a
    stage, has no ``y_(i-1)`` in this, and ``y_s = avg_pool(x_s)``. Gao et al., "Res2Net: A New Multi-scale Backbone
    Architecture", arXiv 1904.01169. The keys of the state dict are those of the authors and of timm.

    Args:
        in_channels: of the input.
        planes: each part has int(planes * base_width / 64) * groups channels, the result 4 * planes.
        stride: of the 3x3 convolutions.
        downsample: makes the shortcut fit where stride or channels change; None: the input itself.
        scale: how many parts, s; 1: a bottleneck.
        groups, base_width: of the 3x3 convolutions; with groups it is Res2NeXt's.
        kind: "normal" or "stage"; "stage" where there is a stride or a downsample when left out.
        dilation: of the 3x3 convolutions; ``first_dilation`` goes before it.
        attention: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C channels, or None.
        attention_at: "end": after the last norm; "middle": of all parts, before the last convolution.
        drop_path: the probability with which a sample skips the block in training.

    Shape: (N, in_channels, H, W) to (N, 4 * planes, H', W'), H / stride and W / stride rounded up.

    Raises:
        ValueError: numbers out of range, an unknown kind, a stride in a normal block, an unknown attention.

    Example:
        >>> y = convblocks.Res2NetBottleneck(256, 64, attention="se")(torch.randn(2, 256, 28, 28))
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        scale: int = 4,
        groups: int = 1,
        base_width: int = 26,
        kind: str | None = None,
        dilation: int = 1,
        first_dilation: int | None = None,
        attention: Attention = None,
        attention_at: str = "end",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(drop_path)
        name = type(self).__name__
        c, out = positive(name, "in_channels", in_channels), positive(name, "planes", planes) * self.expansion
        width = positive(name, "the width", int(planes * base_width / 64)) * positive(name, "groups", groups)
        parts = positive(name, "scale", scale)
        if kind is None:
            kind = "stage" if stride > 1 or downsample is not None else "normal"
        if kind not in ("normal", "stage"):
            raise ValueError(f"{name}: expected kind to be one of normal, stage, got {kind}")
        if kind == "normal" and stride != 1:
            raise ValueError(f"{name}: expected a stride of 1 in a normal block, got {stride}")
        d = dilation if first_dilation is None else first_dilation
        convolutions = max(1, parts - 1)
        self.kind, self.scale = kind, parts
        self.conv1 = nn.Conv2d(c, width * parts, 1, bias=False)
        self.bn1 = BatchNormAct2d(width * parts, "relu", inplace=True)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, d, d, groups, bias=False) for _ in range(convolutions)
        )
        self.bns = nn.ModuleList(BatchNormAct2d(width, "relu", inplace=True) for _ in range(convolutions))
        self.stride = stride
        self.conv3 = nn.Conv2d(width * parts, out, 1, bias=False)
        self.place(attention, attention_at, out, width * parts)
        self.bn3 = self.last_norm(out)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        chunks = convolve(self.conv1, x, self.bn1).chunk(self.scale, 1)
        parts = [chunks[i] for i in range(self.scale)]  # which a tracer can follow
        made: list[Tensor] = []
        room = Room(parts[0] if self.stride == 1 else None, [parts[0].shape[1]] * len(parts))
        for part, conv, bn, out in zip(parts, self.convs, self.bns, room.parts, strict=False):
            part = part + made[-1] if made and self.kind == "normal" else part
            made.append(convolve(conv, part, bn, out=out))
        if self.scale > 1:
            made.append(parts[-1] if self.kind == "normal" else F.avg_pool2d(parts[-1], 3, self.stride, 1))
        y = room.filled(made)
        return self.end(convolve, self.conv3, y if self.middle is None else self.middle(y), self.bn3, x)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, scale={self.scale}"
