"""One record per operation, from which the tests, the benchmark, the self-test and the GPU-code proofs are made.

None of them knows an operation by name: a new operation brings its record here and is covered by all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convblocks import ops
from convblocks.ops.channel_shuffle import reference as _channel_shuffle_reference
from convblocks.ops.eca import PADDINGS
from convblocks.ops.eca import reference as _eca_reference
from convblocks.ops.gate import ACTIVATIONS, GATES
from convblocks.ops.simam import reference as _simam_reference
from convblocks.ops.squeeze_excite import reference as _squeeze_excite_reference

Size = tuple[int, int, int, int]
Options = dict[str, Any]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Ways to lay a feature map out in memory; each keeps the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel_slice": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "channels_last_slice": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "channels_last_expanded": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1))[:, :, 2 : x.shape[2] + 2, 1 : x.shape[3] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),  # the values of the first sample for all
}


@dataclass(frozen=True)
class Sample:
    """A call: ``op(*args, **kwargs)``. ``args[0]`` is the feature map, the other tensors among args are parameters."""

    args: tuple[Any, ...]
    kwargs: Options

    @property
    def x(self) -> Tensor:
        x: Tensor = self.args[0]
        return x

    def tensors(self) -> list[Tensor]:
        return [a for a in self.args if isinstance(a, Tensor)]

    def map(self, f: Callable[[Tensor], Tensor]) -> Sample:
        return Sample(tuple(f(a) if isinstance(a, Tensor) else a for a in self.args), self.kwargs)


@dataclass(frozen=True)
class BadInput:
    """A call that must be refused with these words, on every backend."""

    args: tuple[Any, ...]
    kwargs: Options
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpInfo:
    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]  # plain torch, called as op: the peer that the benchmark compiles, too
    parameters: Callable[[Size, Options, Callable[..., Tensor]], tuple[tuple[Any, ...], Options]]
    options: tuple[Options, ...]  # each is tested; the first is the usual one
    bench: tuple[Options, ...]  # those that the benchmark times
    bad_inputs: Callable[[str], Iterator[BadInput]]
    forward_flops: Callable[[Sample], int]
    backward_flops: Callable[[Sample], int]
    gpu_traffic: tuple[float, float]  # bytes that GPU kernels may move, forward and backward, over least_bytes
    sizes: tuple[Size, ...] = (
        (2, 8, 7, 7),
        (1, 3, 5, 9),
        (3, 16, 14, 14),
        (2, 33, 8, 8),
        (1, 70, 1, 1),
        (2, 1, 3, 4),
        (1, 4, 1, 17),
        (1, 2, 65, 33),
    )
    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES)
    linear: bool = False  # in the map, its only tensor: the backward operator takes no map

    def sample(
        self,
        size: Size,
        options: Options | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        parameter_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> Sample:
        """A call with random values; the values depend on the seed and the sizes only, not on dtype or layout."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        def place(t: Tensor, to: torch.dtype) -> Tensor:
            return t.to(device=device, dtype=to)

        options = self.options[0] if options is None else options
        x = LAYOUTS[layout](place(random(*size), dtype))
        args, kwargs = self.parameters(size, options, random)
        args = tuple(place(a, parameter_dtype or dtype) if isinstance(a, Tensor) else a for a in args)
        sample = Sample((x, *args), kwargs)
        if requires_grad:
            for t in sample.tensors():
                t.requires_grad_()
        return sample

    def least_bytes(self, sample: Sample, backward: bool = False) -> int:
        """The bytes that any kernel has to move: each input read once, each output written once."""
        size = [t.numel() * t.element_size() for t in sample.tensors()]
        if backward and not self.linear:  # reads the gradient, the input and the parameters; writes their gradients
            return 3 * size[0] + 2 * sum(size[1:])
        return 2 * size[0] + sum(size[1:])

    def flops(self, sample: Sample, backward: bool = False) -> int:
        return self.backward_flops(sample) if backward else self.forward_flops(sample)


def _bad_maps(op: str, x: Tensor) -> Iterator[tuple[Tensor, type[Exception], str]]:
    """Feature maps that every operation refuses."""
    yield x[0], ValueError, f"{op}: expected a 4-D input (N, C, H, W), got a 3-D tensor of size {list(x.shape[1:])}"
    yield x[None], ValueError, f"{op}: expected a 4-D input (N, C, H, W), got a 5-D tensor of size {[1, *x.shape]}"
    words = f"{op}: expected an input of dtype float32, float64, float16 or bfloat16, got "
    yield x.to(torch.int64), TypeError, words + "int64"
    yield x.to(torch.complex64), TypeError, words + "complex64"
    yield x > 0, TypeError, words + "bool"


# --- squeeze_excite ---------------------------------------------------------------------------------------------------


def _squeeze_excite_parameters(
    size: Size, o: Options, random: Callable[..., Tensor]
) -> tuple[tuple[Any, ...], Options]:
    c = size[1]
    one_layer, bias, ones = o.get("one_layer", False), o.get("bias", True), (1, 1) if o.get("conv") else ()
    r = c if one_layer else max(1, c // o.get("reduction", 4))
    w1 = None if one_layer else random(r, c, *ones, scale=c**-0.5 * 4)
    b1 = None if one_layer or not bias else random(r, scale=0.5)
    w2, b2 = random(c, r, *ones, scale=r**-0.5), random(c, scale=0.5) if bias else None
    kwargs = {k: v for k, v in o.items() if k in ("activation", "gate", "add_maxpool")}
    return (w1, b1, w2, b2), kwargs


def _squeeze_excite_bad_inputs(device: str) -> Iterator[BadInput]:
    op = "squeeze_excite"
    x = torch.zeros(2, 8, 7, 7, device=device)
    w1, b1, w2, b2 = (torch.zeros(s, device=device) for s in ((4, 8), (4,), (8, 4), (8,)))
    for bad, error, words in _bad_maps(op, x):
        yield BadInput((bad, w1, b1, w2, b2), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"{op}: expected {expected}")

    yield refuse(x, w1[:, :7], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [4, 7]")
    yield refuse(x, w1[:0], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [0, 8]")
    yield refuse(x, w1[0], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [8]")
    yield refuse(x, w1[:, :, None], b1, w2, b2, expected="w1 of size [R, 8] or [R, 8, 1, 1], got [4, 8, 1]")
    yield refuse(x, w1, b1[:3], w2, b2, expected="b1 of size [4], got [3]")
    yield refuse(x, w1, b1, w2.T, b2, expected="w2 of size [8, 4] or [8, 4, 1, 1], got [4, 8]")
    yield refuse(x, w1, b1, None, b2, error=TypeError, expected="w2 to be a tensor, got None")
    yield refuse(x, None, None, w2, b2, expected="w2 of size [8, 8] or [8, 8, 1, 1], got [8, 4]")
    yield refuse(x, w1, b1, w2, b2[None], expected="b2 of size [8], got [1, 8]")
    yield refuse(x, None, b1, w2, b2, expected="b1 only with w1, got b1 of size [4]")
    double = w1.double()
    yield refuse(x, double, b1, w2, b2, error=TypeError, expected="w1 of dtype float32, got float64")
    half, words = x.to(torch.bfloat16), "w1 of dtype bfloat16 or float32, got float64"
    yield refuse(half, double, b1, w2, b2, error=TypeError, expected=words)
    mixed = w1.to(torch.bfloat16)
    yield refuse(half, mixed, None, w2, b2, error=TypeError, expected="w1 of dtype float32 like w2, got bfloat16")
    meta, words = w2.to("meta"), f"w2 on {x.device} like the input, got meta"
    yield refuse(x, w1, b1, meta, b2, error=RuntimeError, expected=words)
    names = f"activation to be one of {', '.join(ACTIVATIONS)}, got swish"
    yield refuse(x, w1, b1, w2, b2, expected=names, activation="swish")
    yield refuse(x, w1, b1, w2, b2, expected=f"gate to be one of {', '.join(GATES)}, got tanh", gate="tanh")
    words = "at least one pixel to take the maximum of, got an input of size [2, 8, 0, 7]"
    yield refuse(x[:, :, :0], w1, b1, w2, b2, expected=words, add_maxpool=True)


def _mlp_macs(sample: Sample) -> int:
    return sample.x.shape[0] * sum(t.numel() for t in sample.tensors()[1:] if t.dim() > 1)


# --- eca --------------------------------------------------------------------------------------------------------------


def _eca_parameters(size: Size, o: Options, random: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Options]:
    k = o.get("k", 3)
    if o.get("padding") == "circular":
        k = min(k, 2 * size[1] + 1)
    bias = random(1) if o.get("bias") else None
    shape = (k,) if o.get("flat") else (1, 1, k)
    return (random(*shape, scale=2.0), bias), {n: v for n, v in o.items() if n in ("gate", "padding")}


def _eca_bad_inputs(device: str) -> Iterator[BadInput]:
    x, w = torch.zeros(2, 8, 7, 7, device=device), torch.zeros(1, 1, 3, device=device)
    for bad, error, words in _bad_maps("eca", x):
        yield BadInput((bad, w), {}, error, words)

    def refuse(*args: Any, error: type[Exception] = ValueError, expected: str, **kwargs: Any) -> BadInput:
        return BadInput(args, kwargs, error, f"eca: expected {expected}")

    words = "weight of size [1, 1, k] or [k] with an odd k, got "
    yield refuse(x, torch.zeros(1, 1, 4, device=device), expected=words + "[1, 1, 4]")
    yield refuse(x, torch.zeros(1, 2, 3, device=device), expected=words + "[1, 2, 3]")
    yield refuse(x, torch.zeros(1, 3, device=device), expected=words + "[1, 3]")
    yield refuse(x, w, w.flatten(), expected="bias of size [1], got [3]")
    yield refuse(x, w.double(), error=TypeError, expected="weight of dtype float32, got float64")
    yield refuse(x, w.to("meta"), error=RuntimeError, expected=f"weight on {x.device} like the input, got meta")
    yield refuse(x, w, expected=f"gate to be one of {', '.join(GATES)}, got relu", gate="relu")
    yield refuse(x, w, expected=f"padding to be one of {', '.join(PADDINGS)}, got same", padding="same")
    wide = torch.zeros(1, 1, 19, device=device)
    words = "at least 9 channels for circular padding of a 19-tap weight, got 8"
    yield refuse(x, wide, expected=words, padding="circular")


# --- simam ------------------------------------------------------------------------------------------------------------


def _simam_bad_inputs(device: str) -> Iterator[BadInput]:
    x = torch.zeros(2, 8, 7, 7, device=device)
    for bad, error, words in _bad_maps("simam", x):
        yield BadInput((bad,), {}, error, words)
    for value in (0.0, -1.0, float("nan")):
        yield BadInput((x, value), {}, ValueError, f"simam: expected e_lambda > 0, got {value:g}")


# --- channel_shuffle --------------------------------------------------------------------------------------------------


def _channel_shuffle_parameters(
    size: Size, o: Options, random: Callable[..., Tensor]
) -> tuple[tuple[Any, ...], Options]:
    groups = math.gcd(size[1], o["groups"])
    return (size[1] // groups if o.get("inverse") else groups,), {}


def _channel_shuffle_bad_inputs(device: str) -> Iterator[BadInput]:
    x = torch.zeros(2, 8, 7, 7, device=device)
    for bad, error, words in _bad_maps("channel_shuffle", x):
        yield BadInput((bad, 2), {}, error, words)
    for groups in (3, 16, 0, -2):
        words = f"channel_shuffle: expected groups that divide the 8 channels, got {groups}"
        yield BadInput((x, groups), {}, ValueError, words)


OPS: dict[str, OpInfo] = {
    info.name: info
    for info in (
        OpInfo(
            name="squeeze_excite",
            op=ops.squeeze_excite,
            reference=_squeeze_excite_reference,
            parameters=_squeeze_excite_parameters,
            options=(
                {"conv": True},
                {"bias": False},
                {"activation": "silu", "reduction": 1},
                {"activation": "gelu", "gate": "hardsigmoid"},
                {"activation": "gelu_tanh"},
                {"activation": "hardswish", "gate": "hardsigmoid", "conv": True},
                {"activation": "leaky_relu"},
                {"activation": "relu6"},
                {"one_layer": True, "gate": "hardsigmoid"},
                {"one_layer": True, "bias": False, "add_maxpool": True},
                {"add_maxpool": True},
            ),
            bench=({"conv": True, "reduction": 16},),
            bad_inputs=_squeeze_excite_bad_inputs,
            forward_flops=lambda s: 2 * s.x.numel() + 2 * _mlp_macs(s),
            backward_flops=lambda s: 5 * s.x.numel() + 6 * _mlp_macs(s),
            gpu_traffic=(1.55, 1.5),  # two reads and a write; backward: x, grad, grad again, and a write
        ),
        OpInfo(
            name="eca",
            op=ops.eca,
            reference=_eca_reference,
            parameters=_eca_parameters,
            options=(
                {"k": 3},
                {"k": 5, "padding": "circular"},
                {"k": 7, "bias": True, "gate": "hardsigmoid"},
                {"k": 1, "flat": True},
                {"k": 3, "padding": "circular", "bias": True},
            ),
            bench=({"k": 5},),
            bad_inputs=_eca_bad_inputs,
            forward_flops=lambda s: 2 * s.x.numel() + 2 * s.x.shape[0] * s.x.shape[1] * s.args[1].numel(),
            backward_flops=lambda s: 5 * s.x.numel() + 6 * s.x.shape[0] * s.x.shape[1] * s.args[1].numel(),
            gpu_traffic=(1.55, 1.5),
        ),
        OpInfo(
            name="simam",
            op=ops.simam,
            reference=_simam_reference,
            parameters=lambda size, o, random: ((), dict(o)),
            options=({"e_lambda": 1e-4}, {"e_lambda": 0.1}),
            bench=({"e_lambda": 1e-4},),
            bad_inputs=_simam_bad_inputs,
            forward_flops=lambda s: 9 * s.x.numel(),
            backward_flops=lambda s: 18 * s.x.numel(),
            gpu_traffic=(1.05, 1.05),
        ),
        OpInfo(
            name="channel_shuffle",
            op=ops.channel_shuffle,
            reference=_channel_shuffle_reference,
            parameters=_channel_shuffle_parameters,
            options=(
                {"groups": 2},
                {"groups": 3},
                {"groups": 2, "inverse": True},
                {"groups": 4, "inverse": True},
                {"groups": 7},
            ),
            bench=({"groups": 2},),
            bad_inputs=_channel_shuffle_bad_inputs,
            forward_flops=lambda s: 0,
            backward_flops=lambda s: 0,
            gpu_traffic=(1.05, 1.05),
            linear=True,
        ),
    )
}
