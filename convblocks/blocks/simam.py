from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import ignore
from convblocks.ops.simam import operator


class SimAM(nn.Module):
    """SimAM: weighs every pixel by how much it stands out in its own plane, without parameters.

    One operation, ``convblocks.ops.simam``. Yang et al., "SimAM: A Simple, Parameter-Free Attention Module for
    Convolutional Neural Networks", ICML 2021 (proceedings.mlr.press/v139/yang21o).

    Args:
        channels, squeeze_channels: taken and ignored, as builders give them to any attention layer; so are timm's
            ``rd_*``, ``act_layer``, ``gate_layer``, ``device`` and the like: there are no parameters.
        e_lambda: the regulariser lambda, > 0. The published ImageNet networks were trained with 0.1; a state dict does
            not tell.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format. A pixel that is alone
        in its plane is scaled by sigmoid(0.5), as one that does not stand out; the operation and the authors' code give
        NaN.

    Raises:
        ValueError: e_lambda is not positive.
        TypeError: an unknown keyword.

    Example:
        >>> y = convblocks.SimAM(e_lambda=0.1)(torch.randn(2, 64, 56, 56))
        >>> model = timm.create_model("resnet50", block_args=dict(attn_layer=convblocks.SimAM))
    """

    def __init__(
        self,
        channels: int | None = None,
        squeeze_channels: int | None = None,
        *,
        input_channels: int | None = None,
        e_lambda: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        ignore("SimAM", ignored)
        if not e_lambda > 0:
            raise ValueError(f"SimAM: expected e_lambda > 0, got {e_lambda:g}")
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        traced = isinstance(x, torch.fx.Proxy) or isinstance(x.shape[0], Tensor)  # sizes are not known
        if not traced and x.dim() == 4 and x.shape[2] * x.shape[3] == 1:
            return x * math.exp(0.5) / (1 + math.exp(0.5))
        return operator(x, self.e_lambda)

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda:g}"
