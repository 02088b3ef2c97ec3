from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convblocks.blocks.arguments import Layer, function_name, ignore, positive
from convblocks.blocks.fused import runs_alone
from convblocks.blocks.layers import fusible, is_plain
from convblocks.ops.apply_gates import operator as apply_gates
from convblocks.ops.channel_attention import operator as channel_attention
from convblocks.ops.channel_pool import operator as channel_pool
from convblocks.ops.depthwise_conv2d import operator as depthwise_conv2d
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.operator import Operator
from convblocks.ops.spatial_attention import convolve
from convblocks.ops.squeeze_excite import operator as squeeze_excite

Run = Callable[..., Tensor]
# Of a whole block: the convolution of its spatial part, and the norm; None where something about the parts has changed.
Parts = Callable[[Any], tuple[nn.Module, nn.Module] | None]


def _is_usual(conv: Any, planes: Tensor) -> bool:
    """Whether it is a convolution to one plane of the same size, and no more than its class."""
    if not fusible(planes, nn.Conv2d, conv):
        return False
    half = tuple(k // 2 for k in conv._parameters["weight"].shape[2:])
    unchanged: bool = conv.stride == conv.dilation == (1, 1) and conv.padding == half and conv.padding_mode == "zeros"
    return unchanged and int(conv.groups) == 1


def _convolve(conv: Any, planes: Tensor, run: Run = depthwise_conv2d) -> Tensor:
    if not _is_usual(conv, planes):
        y: Tensor = conv(planes)
        return y
    p = conv._parameters
    return convolve(planes, p["weight"], p["bias"], run)


def _statistics(norm: Any) -> tuple[Any, ...] | None:
    """What a norm after the convolution computes with at inference; None of one that does something else."""
    if is_plain(norm, nn.Identity):
        return None, None, None, None, 0.0
    if not is_plain(norm, nn.BatchNorm2d) or norm.training or norm.running_mean is None:
        return None
    scales = norm._parameters
    if not scales.keys() >= {"weight", "bias"}:
        return None
    return norm.running_mean, norm.running_var, scales["weight"], scales["bias"], norm.eps


def _gates(conv: Any, norm: Any, planes: Tensor, gate: str, run: Run = depthwise_conv2d) -> Tensor:
    """``gate(norm(conv(planes)))``, at inference on the CPU as one operation."""
    if run is depthwise_conv2d and runs_alone(planes) and _is_usual(conv, planes):
        p, statistics = conv._parameters, _statistics(norm)
        if statistics is not None:
            one: Tensor | None = torch.ops.convblocks._pixel_gates(planes, p["weight"], p["bias"], *statistics, gate)
            if one is not None:
                return one
    return GATES[gate](norm(_convolve(conv, planes, run)))


def _at_once(self: Any, x: Tensor, weights: tuple[Any, ...], conv: Any, norm: Any) -> Tensor | None:
    """The whole block, at inference on the CPU."""
    statistics = _statistics(norm) if runs_alone(x) and _is_usual(conv, x) else None
    if statistics is None:
        return None
    p, functions = conv._parameters, (self.activation_name, self.gate_name)
    y: Tensor | None = torch.ops.convblocks._cbam(
        x, *weights, p["weight"], p["bias"], *statistics, *functions, self.residual
    )
    return y


def fused_forward(
    parts: Parts,
    apply: Run = apply_gates,
    attention: Run = channel_attention,
    pool: Run = channel_pool,
    depthwise: Run = depthwise_conv2d,
) -> Callable[[Any, Tensor], Tensor]:
    """A forward that runs ``self.channel``, of layers fc1 and fc2, and ``self.spatial`` on four operations.

    ``parts`` finds the convolution and the norm of the spatial part. The product with the gates of the channels is
    never written. Where something about the parts has changed, ``self.unfused`` computes what they would.
    """
    ours = (apply, attention, pool, depthwise) == (apply_gates, channel_attention, channel_pool, depthwise_conv2d)

    def forward(self: Any, x: Tensor) -> Tensor:
        channel, spatial = self._modules["channel"], self._modules["spatial"]
        weights, layers = _weights(x, channel, spatial), parts(self)
        if weights is None or layers is None:
            unfused: Tensor = self.unfused(x)
            return unfused
        conv, norm = layers
        y = _at_once(self, x, weights, conv, norm) if ours else None
        if y is not None:
            return y
        gates, x = _hand_on(attention, x, *weights, self.activation_name, self.gate_name)
        planes, x = _hand_on(pool, x, gates)
        pixels = _gates(conv, norm, planes, self.gate_name, depthwise)
        return apply(x, gates, pixels.to(x.dtype), self.residual)

    return forward


def fused_light_forward(
    parts: Parts,
    apply: Run = apply_gates,
    excite: Run = squeeze_excite,
    pool: Run = channel_pool,
    depthwise: Run = depthwise_conv2d,
) -> Callable[[Any, Tensor], Tensor]:
    """The same of the light forms, which mix mean and maximum before anything sees them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        channel, spatial = self._modules["channel"], self._modules["spatial"]
        weights, layers = _weights(x, channel, spatial), parts(self)
        if weights is None or layers is None:
            unfused: Tensor = self.unfused(x)
            return unfused
        conv, norm = layers
        y = excite(x, *weights, self.activation_name, self.gate_name, True)
        planes, y = _hand_on(pool, y, None)
        pixels = _gates(conv, norm, _mixed(planes), self.gate_name, depthwise)
        y = apply(y, None, pixels.to(x.dtype), False)
        return y + x if self.residual else y

    return forward


def _hand_on(run: Run, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return run.handing_on(x, *args) if isinstance(run, Operator) else (run(x, *args), x)


def _weights(x: Tensor, channel: Any, spatial: Any) -> tuple[Any, ...] | None:
    layers = channel._modules
    fc1, fc2 = layers.get("fc1"), layers.get("fc2")
    if not (is_plain(channel, type(channel)) and is_plain(spatial, type(spatial))):
        return None
    if not fusible(x, nn.Conv2d, fc1, fc2):
        return None
    p, q = fc1._parameters, fc2._parameters
    return p["weight"], p["bias"], q["weight"], q["bias"]


def _mixed(planes: Tensor) -> Tensor:
    mixed: Tensor = 0.5 * planes[:, :1] + 0.5 * planes[:, 1:]
    return mixed


class ChannelAttention(nn.Module):
    """The channel half of CBAM: gates from the mean and the maximum of each plane, through the same two layers.

    ``y = x * gate(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))``, ``mlp(s) = fc2(act(fc1(s)))``
    (``convblocks.ops.channel_attention``). Woo et al., "CBAM: Convolutional Block Attention Module", arXiv 1807.06521.

    Args:
        channels: channels C of the input.
        reduction: the hidden layer has C // reduction units; or as many as ``rd_channels`` says.
        bias: whether the two layers have one.
        light: the layers see ``0.5 * mean + 0.5 * maximum`` once (timm's LightChannelAttn).
        act_layer: a name, a module, or a class or partial that makes one; relu, relu6, silu, gelu, gelu_tanh, hardswish
            or leaky_relu (slope 0.01).
        gate_layer: likewise sigmoid or hardsigmoid.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels or reduction are no positive integer, or leave no hidden unit; an unknown activation or
            gate.

    Example:
        >>> y = convblocks.ChannelAttention(64)(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        rd_channels: int | None = None,
        bias: bool = True,
        light: bool = False,
        act_layer: Layer = "relu",
        gate_layer: Layer = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        c = positive(name, "channels", channels)
        r = c // positive(name, "reduction", reduction) if rd_channels is None else rd_channels
        if rd_channels is None and r == 0:
            raise ValueError(
                f"{name}: expected a reduction that leaves a hidden unit, got {reduction} for {c} channels"
            )
        self.activation_name = function_name(name, "act_layer", act_layer, ACTIVATIONS)
        self.gate_name = function_name(name, "gate_layer", gate_layer, GATES)
        self.light = light
        self.fc1 = nn.Conv2d(c, positive(name, "rd_channels", r), 1, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(r, c, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights = _weights(x, self, self)
        if weights is None:
            return self.unfused(x)
        if self.light:
            return squeeze_excite(x, *weights, self.activation_name, self.gate_name, True)
        gates, x = channel_attention.handing_on(x, *weights, self.activation_name, self.gate_name)
        return apply_gates(x, gates, None, False)

    def unfused(self, x: Tensor) -> Tensor:
        def layers(s: Tensor) -> Tensor:
            y: Tensor = self.fc2(ACTIVATIONS[self.activation_name](self.fc1(s)))
            return y

        mean, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        logits = layers(0.5 * mean + 0.5 * maximum) if self.light else layers(mean) + layers(maximum)
        return x * GATES[self.gate_name](logits)

    def extra_repr(self) -> str:
        return f"activation={self.activation_name}, gate={self.gate_name}" + (", light=True" if self.light else "")


class SpatialAttention(nn.Module):
    """The spatial half of CBAM: gates from the mean and the maximum over the channels of each pixel, convolved.

    ``y = x * gate(bn(conv(cat(x.mean(1), x.amax(1)))))``; mean and maximum come from one read
    (``convblocks.ops.channel_pool``). Woo et al., "CBAM: Convolutional Block Attention Module", arXiv 1807.06521.

    Args:
        kernel_size: of the convolution, odd.
        bias: whether it has one.
        norm: whether batch norm follows it.
        momentum: of the batch norm.
        light: the convolution sees one plane, ``0.5 * mean + 0.5 * maximum`` (timm's LightSpatialAttn).
        gate_layer: a name, a module, or a class or partial that makes one; sigmoid or hardsigmoid.
        device, dtype: of the parameters.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: a kernel_size that is no odd positive integer, an unknown gate.

    Example:
        >>> y = convblocks.SpatialAttention(7)(torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        kernel_size: int = 7,
        *,
        bias: bool = False,
        norm: bool = True,
        momentum: float = 0.01,
        light: bool = False,
        gate_layer: Layer = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        k = positive(name, "kernel_size", kernel_size)
        if k % 2 == 0:
            raise ValueError(f"{name}: expected an odd kernel_size, got {k}")
        self.gate_name = function_name(name, "gate_layer", gate_layer, GATES)
        self.light = light
        planes = 1 if light else 2
        self.conv = nn.Conv2d(planes, 1, k, padding=k // 2, bias=bias, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(1, momentum=momentum, device=device, dtype=dtype) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        planes, x = channel_pool.handing_on(x, None)
        pixels = _gates(self.conv, self.bn, _mixed(planes) if self.light else planes, self.gate_name)
        return apply_gates(x, None, pixels.to(x.dtype), False)

    def unfused(self, x: Tensor) -> Tensor:
        planes = torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)
        return x * GATES[self.gate_name](self.bn(self.conv(_mixed(planes) if self.light else planes)))

    def extra_repr(self) -> str:
        return f"gate={self.gate_name}" + (", light=True" if self.light else "")


class CBAM(nn.Module):
    """Convolutional block attention: gates for the channels, and then gates for the pixels.

    ``ChannelAttention``, then ``SpatialAttention`` of its result, which is never written. Woo et al., "CBAM:
    Convolutional Block Attention Module", arXiv 1807.06521.

    ``CBAM(c)`` is the authors' block and pytorchcv's, ``CBAM(c, mlp_bias=False, momentum=0.1)`` timm's CbamModule, with
    ``light=True`` its LightCbamModule. The keys of the state dict are ``channel.fc1``, ``channel.fc2``,
    ``spatial.conv`` and ``spatial.bn``; the convolution sees the means first. ``convert_state_dict`` reads the others,
    and exchanges the two planes of those that see the maxima first (the authors, pytorchcv).

    Args:
        channels: channels C of the input.
        reduction: the hidden layer has C // reduction units; or as many as ``rd_channels`` says.
        kernel_size: of the spatial convolution, odd.
        mlp_bias: whether the two layers of the channel part have one.
        spatial_bn, spatial_bias: whether batch norm follows the convolution, and whether it has a bias.
        momentum: of the batch norm.
        residual: adds x.
        light: timm's light form: mean and maximum are mixed before the layers, and before the convolution.
        act_layer: of the channel part: a name, a module, or a class or partial that makes one; relu, relu6, silu, gelu,
            gelu_tanh, hardswish or leaky_relu (slope 0.01).
        gate_layer: of both parts: likewise sigmoid or hardsigmoid.
        device, dtype: of the parameters.

        Keywords that timm's builders give to any attention layer are ignored.

    Shape: (N, C, H, W) to the same; float32, float64, float16 or bfloat16, in x's memory format.

    Raises:
        ValueError: channels or reduction are no positive integer, or leave no hidden unit; an even kernel_size; an
            unknown activation or gate.
        TypeError: an unknown keyword.

    Example:
        >>> y = convblocks.CBAM(64)(torch.randn(2, 64, 56, 56))
        >>> model = timm.create_model("resnet50", block_args=dict(attn_layer=convblocks.CBAM))
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        rd_channels: int | None = None,
        kernel_size: int = 7,
        mlp_bias: bool = True,
        spatial_bn: bool = True,
        spatial_bias: bool = False,
        momentum: float = 0.01,
        residual: bool = False,
        light: bool = False,
        act_layer: Layer = "relu",
        gate_layer: Layer = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        ignore("CBAM", ignored)
        placed: dict[str, Any] = {"light": light, "gate_layer": gate_layer, "device": device, "dtype": dtype}
        self.channel = ChannelAttention(
            channels, reduction, rd_channels=rd_channels, bias=mlp_bias, act_layer=act_layer, **placed
        )
        self.spatial = SpatialAttention(kernel_size, bias=spatial_bias, norm=spatial_bn, momentum=momentum, **placed)
        self.activation_name, self.gate_name = self.channel.activation_name, self.channel.gate_name
        self.residual, self.light = residual, light

    def forward(self, x: Tensor) -> Tensor:
        return _light_forward(self, x) if self.light else _forward(self, x)

    def unfused(self, x: Tensor) -> Tensor:
        y: Tensor = self.spatial(self.channel(x))
        return y + x if self.residual else y

    def extra_repr(self) -> str:
        return "residual=True" if self.residual else ""


def _parts(self: Any) -> tuple[nn.Module, nn.Module]:
    layers = self._modules["spatial"]._modules
    return layers["conv"], layers["bn"]


_forward, _light_forward = fused_forward(_parts), fused_light_forward(_parts)
