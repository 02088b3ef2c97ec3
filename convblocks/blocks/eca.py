from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name, ignore, positive
from convblocks.blocks.layers import fusible
from convblocks.ops.checks import one_of
from convblocks.ops.eca import PADDINGS, operator
from convblocks.ops.gate import GATES


def fused_forward(run: Callable[..., Tensor] = operator) -> Callable[[Any, Tensor], Tensor]:
    """A forward that runs ``self.conv`` and the gate as one operation, as that of ``blocks.squeeze_excite`` does."""

    def forward(self: Any, x: Tensor) -> Tensor:
        conv = self._modules["conv"]
        if not fusible(x, nn.Conv1d, conv):
            return self.unfused(x)  # type: ignore[no-any-return]
        p = conv._parameters
        return run(x, p["weight"], p["bias"], self.gate_name, self.padding_mode)

    return forward


class ECA(nn.Module):
    """Efficient channel attention: scales every channel by a gate computed from the means of its neighbours.

    ``y = x * gate(conv(x.mean((2, 3))))`` with one filter of k taps sliding over the channels, one operation
    (``convblocks.ops.eca``). Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural
    Networks", arXiv 1910.03151.

    The key of the state dict (``conv``) is that of the official code and of timm's EcaModule and CecaModule.

    Args:
        channels: channels C of the input, from which k follows: the odd number at or above
            ``int(abs(log2(C) + beta) / gamma)``, at least 3. None: k is 3. ``input_channels`` is the same.
        squeeze_channels: taken and ignored, as torchvision gives it to any ``se_layer``; so are timm's ``rd_*``,
            ``act_layer`` and ``norm_layer``.
        kernel_size: k, odd, whatever the channels: the authors' networks have it per stage. (timm heeds its
            ``kernel_size`` only without channels.)
        gamma, beta: of the rule above.
        bias: whether the filter has one; the paper's has none.
        padding_mode: "zeros", or "circular" for the channels from the other end (timm's CecaModule).
        gate_layer: a name, a module, or a class or partial that makes one; sigmoid or hardsigmoid.
            ``scale_activation`` is the same.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: an even kernel_size, channels that are no positive integer, an unknown gate or padding_mode.
        TypeError: an unknown keyword.

    Example:
        >>> y = convblocks.ECA(64)(torch.randn(2, 64, 56, 56))
        >>> model = timm.create_model("resnet50", block_args=dict(attn_layer=convblocks.ECA))
    """

    def __init__(
        self,
        channels: int | None = None,
        squeeze_channels: int | None = None,
        *,
        input_channels: int | None = None,
        kernel_size: int | None = None,
        gamma: float = 2,
        beta: float = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "circular"] = "zeros",
        gate_layer: Layer | None = None,
        scale_activation: Layer | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        ignore("ECA", ignored)
        channels = input_channels if channels is None else channels
        if kernel_size is not None:
            k = positive("ECA", "kernel_size", kernel_size)
        elif channels is not None:
            t = int(abs(math.log2(positive("ECA", "channels", channels)) + beta) / gamma)
            k = max(t + 1 - t % 2, 3)
        else:
            k = 3
        if k % 2 == 0:
            raise ValueError(f"ECA: expected an odd kernel_size, got {k}")
        one_of("ECA", "padding_mode", padding_mode, PADDINGS)
        self.gate_name = function_name("ECA", "gate_layer", scale_activation or gate_layer or "sigmoid", GATES)
        self.padding_mode = padding_mode
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, padding_mode=padding_mode, bias=bias, device=device, dtype=dtype)

    forward = fused_forward()

    def unfused(self, x: Tensor) -> Tensor:
        s = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * GATES[self.gate_name](s)[:, :, None, None]

    def extra_repr(self) -> str:
        return f"gate={self.gate_name}"
