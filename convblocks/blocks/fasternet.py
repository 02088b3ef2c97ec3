from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_of, positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.drop_path import check_drop_path, drop_path
from convblocks.blocks.fused import Layers, run_layers
from convblocks.blocks.layers import is_plain
from convblocks.blocks.partial_conv import PartialConv

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "relu6": nn.ReLU6}


def activation(act: Layer) -> nn.Module:
    if isinstance(act, str):
        if act not in _ACTIVATIONS:
            raise ValueError(f"FasterNetBlock: expected act_layer to be one of {', '.join(_ACTIVATIONS)}, got {act}")
        act = _ACTIVATIONS[act]
    layer: nn.Module = act if isinstance(act, nn.Module) else act()
    return layer


class FasterNetBlock(nn.Module):
    """FasterNet's block: a partial convolution, then two pointwise ones with a norm and an activation between them.

    ``y = x + drop_path(layer_scale * se(mlp(spatial_mixing(x))))``. Chen et al., "Run, Don't Walk: Chasing Higher FLOPS
    for Faster Neural Networks", arXiv 2303.03667. The keys of the state dict are those of the authors and of timm's
    MLPBlock.

    Args:
        dim: channels C.
        n_div: of ``PartialConv``.
        mlp_ratio: the hidden layer has int(C * mlp_ratio) channels.
        drop_path: the probability with which a sample skips the block in training.
        layer_scale_init_value: the first value of a factor for each channel; 0: there is none.
        act_layer: a name, a module, or a class or partial that makes one.
        norm_layer: makes a norm of so many channels; None: batch norm, in one with the activation
            (``BatchNormAct2d``) where that is one of convblocks' own.
        pconv_fw_type: ``forward`` of ``PartialConv``.
        attention: of what the block adds: a name ("se", "eca", "cbam", "simam", ...), what makes a module for C
            channels, or None.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same.

    Raises:
        ValueError: numbers out of range, an unknown activation or attention.

    Example:
        >>> y = convblocks.FasterNetBlock(64, act_layer="gelu")(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        dim: int,
        n_div: int = 4,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 0.0,
        act_layer: Layer = "relu",
        norm_layer: Callable[..., nn.Module] | None = None,
        pconv_fw_type: str = "split_cat",
        *,
        attention: Attention = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = positive("FasterNetBlock", "dim * mlp_ratio", int(dim * mlp_ratio))
        act = activation(act_layer)
        own = function_of(act)
        if norm_layer is None and own is not None:
            norm: nn.Module = BatchNormAct2d(hidden, own, inplace=True, device=device, dtype=dtype)
            act = nn.Identity()
        else:
            norm = (norm_layer or nn.BatchNorm2d)(hidden, device=device, dtype=dtype)
        self.mlp = Layers(
            nn.Conv2d(dim, hidden, 1, bias=False, device=device, dtype=dtype),
            norm,
            act,
            nn.Conv2d(hidden, dim, 1, bias=False, device=device, dtype=dtype),
        )
        self.spatial_mixing = PartialConv(dim, n_div, pconv_fw_type, device=device, dtype=dtype)
        scale = torch.full((dim,), float(layer_scale_init_value), device=device, dtype=dtype)
        self.layer_scale = nn.Parameter(scale) if layer_scale_init_value > 0 else None
        self.se = attention_layer("FasterNetBlock", attention, dim)
        self.drop_path = check_drop_path("FasterNetBlock", drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.spatial_mixing(x)
        added_only = self.se is None and self.layer_scale is None and (self.drop_path == 0 or not self.training)
        if added_only and is_plain(self.mlp, Layers):
            added: Tensor = run_layers(self.mlp, y, x)
            return added
        y = self.mlp(y)
        y = y if self.se is None else self.se(y)
        if self.layer_scale is not None:
            y = y * self.layer_scale[:, None, None]
        return x + drop_path(y, self.drop_path, self.training)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}" if self.drop_path else ""
