from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.layers import fusible, is_plain
from convblocks.blocks.squeeze_excite import SqueezeExcite
from convblocks.ops.checks import one_of
from convblocks.ops.scse import MODES, operator

Layers = Mapping[str, type[nn.Module]]


def fused_forward(
    channel: type[nn.Module],
    channel_layers: Layers,
    spatial: type[nn.Module],
    spatial_layers: Layers,
    run: Callable[..., Tensor] = operator,
) -> Callable[[Any, Tensor], Tensor]:
    """A forward that runs ``self.cSE`` and ``self.sSE`` as one operation.

    They are of these classes and have these layers, of which the convolutions are two and one. Where something about
    them has changed, ``self.unfused`` computes what they would.
    """

    def convolutions(part: Any, kind: type[nn.Module], expected: Layers) -> list[Any] | None:
        layers = part._modules if is_plain(part, kind) else {}
        if layers.keys() != expected.keys():
            return None
        if not all(is_plain(layers[name], cls) for name, cls in expected.items()):
            return None
        return [layers[name] for name, cls in expected.items() if cls is nn.Conv2d]

    def forward(self: Any, x: Tensor) -> Tensor:
        children = self._modules
        first = convolutions(children["cSE"], channel, channel_layers)
        last = convolutions(children["sSE"], spatial, spatial_layers)
        if first is None or last is None or not fusible(x, nn.Conv2d, *first, *last):
            unfused: Tensor = self.unfused(x)
            return unfused
        p, q, r = (layer._parameters for layer in (*first, *last))
        return run(x, p["weight"], p["bias"], q["weight"], q["bias"], r["weight"], r["bias"], self.mode)

    return forward


class ChannelSE(SqueezeExcite):
    """The channel part of scSE: squeeze-and-excitation whose width is a fraction of the channels, rounded down.

    ``y = x * sigmoid(fc2(relu(fc1(x.mean((2, 3))))))``, one operation (``convblocks.ops.squeeze_excite``). Roy et al.,
    "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks", arXiv 1803.02579, where it
    is called cSE.

    Args:
        channels: channels C of the input.
        reduction: the hidden layer has C // reduction units, at least one.
        bias: whether the two layers have one.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels or reduction are no positive integer.

    Example:
        >>> y = convblocks.ChannelSE(64, reduction=2)(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        c, r = positive("ChannelSE", "channels", channels), positive("ChannelSE", "reduction", reduction)
        super().__init__(c, max(1, c // r), bias=bias, device=device, dtype=dtype)


class SpatialSE(nn.Module):
    """The spatial part of scSE: scales every pixel by a gate computed from all of its channels.

    ``y = x * sigmoid(conv(x))`` with a 1x1 convolution to one channel, one operation (``convblocks.ops.scse``). Roy et
    al., "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks", arXiv 1803.02579, where
    it is called sSE.

    Args:
        channels: channels C of the input.
        bias: whether the convolution has one.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels that are no positive integer.

    Example:
        >>> y = convblocks.SpatialSE(64)(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        channels: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = positive("SpatialSE", "channels", channels)
        self.conv = nn.Conv2d(c, 1, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self._modules["conv"]
        if not fusible(x, nn.Conv2d, conv):
            return self.unfused(x)
        p = conv._parameters
        return operator(x, None, None, None, None, p["weight"], p["bias"], "add")

    def unfused(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class SCSE(nn.Module):
    """Concurrent spatial and channel squeeze-and-excitation: gates for the channels and for the pixels, combined.

    ``cSE(x)`` is x times the gates of its channels (``ChannelSE``), ``sSE(x)`` is x times the gates of its pixels
    (``SpatialSE``); both and their combination are one operation (``convblocks.ops.scse``). Roy et al., "Concurrent
    Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks", arXiv 1803.02579, and "Recalibrating
    Fully Convolutional Networks with Spatial and Channel 'Squeeze & Excitation' Blocks", arXiv 1808.08127.

    ``SCSE(c)`` is the SCSEModule of segmentation_models_pytorch, ``SCSE(c, reduction=2, mode="max")`` the authors'
    ChannelSpatialSELayer. The keys of the state dict (``cSE.fc1``, ``cSE.fc2``, ``sSE.conv``) are the authors';
    ``convert_state_dict`` reads both.

    Args:
        channels: channels C of the input.
        reduction: the hidden layer of the channel part has C // reduction units, at least one.
        mode: "add" ``cSE(x) + sSE(x)``, "max" the larger of the two, "mul" their product, "concat" both, 2 C channels.
        bias: whether the three layers have one.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same, or to (N, 2 C, H, W) for "concat"; float32, float64, float16 or bfloat16, in x's
    memory format.

    Raises:
        ValueError: channels or reduction are no positive integer, an unknown mode.

    Example:
        >>> y = convblocks.SCSE(64, mode="max")(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        mode: str = "add",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive("SCSE", "channels", channels)
        positive("SCSE", "reduction", reduction)
        one_of("SCSE", "mode", mode, MODES)
        self.mode = mode
        self.cSE = ChannelSE(channels, reduction, bias=bias, device=device, dtype=dtype)
        self.sSE = SpatialSE(channels, bias=bias, device=device, dtype=dtype)

    forward = fused_forward(ChannelSE, {"fc1": nn.Conv2d, "fc2": nn.Conv2d}, SpatialSE, {"conv": nn.Conv2d})

    def unfused(self, x: Tensor) -> Tensor:
        channel, spatial = self.cSE(x), self.sSE(x)
        if self.mode == "concat":
            return torch.cat((channel, spatial), 1)
        if self.mode == "max":
            return torch.maximum(channel, spatial)
        y: Tensor = channel * spatial if self.mode == "mul" else channel + spatial
        return y

    def extra_repr(self) -> str:
        return f"mode={self.mode}"
