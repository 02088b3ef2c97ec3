from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name, positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.batch_norm_act import BatchNormAct2d, scale_shift
from convblocks.blocks.branch import Branch
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.convert import Layout, rename
from convblocks.blocks.layers import fusible, is_plain
from convblocks.ops.apply_gates import operator as apply_gates
from convblocks.ops.channel_shuffle import channel_shuffle
from convblocks.ops.concat_shuffle import concat_shuffle
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.scale_shift_act import operator as scale_shift_act
from convblocks.ops.squeeze_excite import operator as squeeze_excite


class _Squeeze(nn.Module):
    """Squeeze-excite of one layer, under the names that ParNet's has; or its gates alone."""

    def __init__(self, channels: int, out: int, groups: int, bias: bool, gates_only: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, out, 1, groups=groups, bias=bias)
        self.cvsig = nn.Sequential(OrderedDict(conv=conv))
        self.gates_only = gates_only

    def forward(self, x: Tensor) -> Tensor:
        conv = self.cvsig[0]
        usual = conv.groups == 1 and is_plain(self.cvsig, nn.Sequential) and fusible(x, nn.Conv2d, conv)
        if usual and not self.gates_only:
            return squeeze_excite(x, None, None, conv.weight, conv.bias, "relu", "sigmoid", False)
        gates = torch.sigmoid(self.cvsig(x.mean((2, 3), keepdim=True)))
        return gates if self.gates_only else x * gates


class ParNetBlock(nn.Module):
    """ParNet's block: a 3x3 and a 1x1 convolution side by side, which become one, and squeeze-excite round them.

    ``act(bn3(conv3(x)) + bn1(conv1(x)) + sse(x))``, where ``sse(x) = u * sigmoid(fc(u.mean((2, 3))))`` and
    ``u = bn(x)``: "skip squeeze-excite". A block that changes channels or size has no such branch: there all is scaled
    by ``2 * sigmoid(fc(x.mean((2, 3))))``, the 1x1 convolution is of the averages of 2x2 pixels if it strides, and
    groups are shuffled in the end. ``fuse`` makes one 3x3 convolution of both. Goyal et al., "Non-deep Networks",
    arXiv 2110.07641. The keys of the state dict are those of the authors; those of External-Attention's
    ParNetAttention are read, too (``sse_bn=False``).

    Args:
        in_channels: of the input.
        out_channels: of the result; in_channels when left out.
        stride: 1 or 2.
        groups: of all convolutions.
        attention: "se": that of the formula; any other name ("eca", "cbam", "simam", ...), what makes a module for C
            channels, or None in its place.
        activation: a name, a module, or a class or partial that makes one.
        sse_bn: whether the skip squeeze-excite has its norm; without it, the form that is widespread as
            "ParNetAttention", all convolutions have a bias.

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), H / stride and W / stride rounded up: odd sizes are
        averaged with zeros beyond the edge, as the one convolution does.

    Raises:
        ValueError: channels, groups or a stride that do not fit, an unknown attention or activation.

    Example:
        >>> block = convblocks.ParNetBlock(64).eval()
        >>> x = torch.randn(2, 64, 28, 28)
        >>> torch.testing.assert_close(block(x), block.fuse()(x), rtol=1e-4, atol=1e-5)
    """

    layouts = (
        Layout(
            "official",
            (
                rename(r"sse\.1\.(.+)", r"se.cvsig.conv.\1"),
                rename(r"conv1x1\.0\.(.+)", r"rbr_1x1.conv.\1"),
                rename(r"conv1x1\.1\.(.+)", r"rbr_1x1.bn.\1"),
                rename(r"conv3x3\.0\.(.+)", r"rbr_dense.conv.\1"),
                rename(r"conv3x3\.1\.(.+)", r"rbr_dense.bn.\1"),
            ),
        ),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        stride: int = 1,
        groups: int = 1,
        *,
        attention: Attention = "se",
        activation: Layer = "silu",
        sse_bn: bool = True,
    ) -> None:
        super().__init__()
        name = "ParNetBlock"
        c = positive(name, "in_channels", in_channels)
        out = positive(name, "out_channels", c if out_channels is None else out_channels)
        if stride not in (1, 2):
            raise ValueError(f"{name}: expected a stride of 1 or 2, got {stride}")
        if c % positive(name, "groups", groups) or out % groups:
            raise ValueError(f"{name}: expected groups that divide {c} and {out} channels, got {groups}")
        self.activation_name = function_name(name, "activation", activation, ACTIVATIONS)
        self.groups, self.stride, self.fused = groups, stride, False
        self.skips = c == out and stride == 1
        if not (sse_bn or self.skips):
            raise ValueError(f"{name}: expected sse_bn where channels or size change, got {sse_bn}")
        self.rbr_identity = BatchNormAct2d(c) if self.skips and sse_bn else None
        self.gated = not self.skips and attention is not None
        last = "none" if self.gated else self.activation_name
        self.rbr_dense: Any = _branch(c, out, 3, stride, groups, not sse_bn, last)
        pointwise = _branch(c, out, 1, 1, groups, not sse_bn, "none")
        pool = nn.AvgPool2d(2, ceil_mode=True, divisor_override=4)
        self.rbr_1x1: Any = pointwise if stride == 1 else nn.Sequential(pool, pointwise)
        self.se: Any = attention_layer(name, None if attention == "se" else attention, out)
        if attention == "se":
            self.se = _Squeeze(c, out, groups, not sse_bn, self.gated)

    def forward(self, x: Tensor) -> Tensor:
        y = self._convolutions(x, self._skip(x) if self.skips else None)
        if self.gated:
            if isinstance(self.se, _Squeeze):
                y = apply_gates(y, (2 * self.se(x)).to(y.dtype), None, False)
            else:
                y = self.se(y)
            y = ACTIVATIONS[self.activation_name](y)
        return y if self.groups == 1 else channel_shuffle(y, self.groups)

    def _skip(self, x: Tensor) -> Tensor:
        u: Tensor = x if self.rbr_identity is None else self.rbr_identity(x)
        attended: Tensor = u if self.se is None else self.se(u)
        return attended

    def _convolutions(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Their sum with what skips them, and the activation where nothing comes between."""
        dense = self.rbr_dense
        if self.fused:
            y = dense._conv_forward(x, dense.weight, None)
            skip = None if skip is None else skip.to(y.dtype)
            act = "none" if self.gated else self.activation_name
            return scale_shift_act(y, torch.ones_like(dense.bias), dense.bias, skip, act)
        both: Tensor = dense(x, self.rbr_1x1(x, skip) if self.stride == 1 else self.rbr_1x1(x))
        return both

    def fuse(self) -> ParNetBlock:
        """Makes one convolution, with a bias, of the two and their norms, as they are in evaluation.

        Its weights have the keys ``rbr_dense.weight`` and ``rbr_dense.bias``, as the authors' fused networks.
        """
        if self.fused:
            return self
        dense, pointwise = self.rbr_dense, self.rbr_1x1 if self.stride == 1 else self.rbr_1x1[1]
        weight, bias = _folded(dense)
        small, more = _folded(pointwise)
        small = F.pad(small, (1, 1, 1, 1)) if self.stride == 1 else F.pad(small.expand(-1, -1, 2, 2) / 4, (1, 0, 1, 0))
        old = dense.conv
        conv = nn.Conv2d(old.in_channels, old.out_channels, 3, self.stride, 1, groups=self.groups, device="meta")
        conv.weight = nn.Parameter((weight + small).to(old.weight.dtype))
        conv.bias = nn.Parameter((bias + more).to(old.weight.dtype))
        self.rbr_dense = conv.train(self.training)
        del self.rbr_1x1
        self.fused = True
        return self

    def extra_repr(self) -> str:
        return f"activation={self.activation_name}" + (", fused" if self.fused else "")


def _branch(c: int, out: int, k: int, stride: int, groups: int, bias: bool, activation: str) -> Branch:
    conv, norm = ConvNormAct(c, out, k, stride, groups=groups, bias=bias, activation=activation)
    return Branch(OrderedDict(conv=conv, bn=norm))


@torch.no_grad()
def _folded(layers: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what it and its norm do."""
    scale, shift = scale_shift(layers.bn, layers.conv.bias)
    return layers.conv.weight * scale[:, None, None, None], shift


class ParNetFusion(nn.Module):
    """ParNet's fusion of two streams: a norm of each, then their channels in turns.

    ``channel_shuffle(cat(b1(x), b2(y)), 2)``, concatenation and shuffle in one operation
    (``convblocks.ops.concat_shuffle``). A ``ParNetBlock`` of two groups comes next in the network. Goyal et al.,
    "Non-deep Networks", arXiv 2110.07641. The keys of the state dict are those of the authors.

    Args:
        channels: C, of each map.

    Shape: two maps (N, C, H, W) to (N, 2 * C, H, W).

    Raises:
        ValueError: channels that are no positive integer.

    Example:
        >>> y = convblocks.ParNetFusion(64)(torch.randn(2, 2, 64, 28, 28))
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = positive("ParNetFusion", "channels", channels)
        self.b1, self.b2 = BatchNormAct2d(c), BatchNormAct2d(c)

    def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
        first, second = maps
        return concat_shuffle((self.b1(first), self.b2(second)), 2)
