from __future__ import annotations

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import Room, convolve


class Fire(nn.Module):
    """SqueezeNet's block: few channels by a 1x1 convolution, then many of these by a 1x1 and a 3x3 one.

    ``s = relu(squeeze(x)); y = se(relu(cat(expand1x1(s), expand3x3(s))))``, and x more with ``bypass``. Iandola et al.,
    "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", arXiv 1602.07360. The keys of
    the state dict are those of torchvision.

    Args:
        in_channels: of the input.
        squeeze: channels of the squeeze convolution.
        expand1x1, expand3x3: channels of the others; four times as many each if not given, as in SqueezeNet.
        bypass: adds the input, which needs as many channels as the result.
        attention: after the concatenation: a name ("se", "eca", "cbam", ...), what makes a module for C channels, or
            None.
        drop_path: the probability with which a sample has the input alone in training; only with ``bypass``.
        device, dtype: of the parameters, but for those of the attention.

    Shape: (N, in_channels, H, W) to (N, expand1x1 + expand3x3, H, W).

    Raises:
        ValueError: channels that are no positive integers or do not fit, an unknown attention.

    Example:
        >>> y = convblocks.Fire(96, 16, attention="eca")(torch.randn(2, 96, 54, 54))
    """

    def __init__(
        self,
        in_channels: int,
        squeeze: int,
        expand1x1: int | None = None,
        expand3x3: int | None = None,
        *,
        bypass: bool = False,
        attention: Attention = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c, s = positive("Fire", "in_channels", in_channels), positive("Fire", "squeeze", squeeze)
        one = positive("Fire", "expand1x1", 4 * s if expand1x1 is None else expand1x1)
        three = positive("Fire", "expand3x3", 4 * s if expand3x3 is None else expand3x3)
        self.widths = (one, three)
        self.bypass, self.drop_path = bypass, check_drop_path("Fire", drop_path)
        if bypass and c != one + three:
            raise ValueError(f"Fire: expected in_channels of {one + three} for a bypass, as the result has, got {c}")
        if drop_path > 0 and not bypass:
            raise ValueError(f"Fire: expected drop_path of 0 without a bypass, got {drop_path}")
        self.squeeze = nn.Conv2d(c, s, 1, device=device, dtype=dtype)
        self.expand1x1 = nn.Conv2d(s, one, 1, device=device, dtype=dtype)
        self.expand3x3 = nn.Conv2d(s, three, 3, padding=1, device=device, dtype=dtype)
        self.se = attention_layer("Fire", attention, one + three)

    def forward(self, x: Tensor) -> Tensor:
        s = convolve(self.squeeze, x, activation="relu")
        expands = (self.expand1x1, self.expand3x3)
        room = Room(s, self.widths)
        maps = [
            convolve(expand, s, activation="relu", out=part) for expand, part in zip(expands, room.parts, strict=True)
        ]
        y = room.filled(maps)
        y = y if self.se is None else self.se(y)
        return drop_path(y, self.drop_path, self.training) + x if self.bypass else y

    def extra_repr(self) -> str:
        return "bypass=True" if self.bypass else ""
