"""Spatial attention, and the block of attention that is composed of operations: as accurate as torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convblocks.accuracy import run
from convblocks.opinfo import COMPOSED, OpInfo, Options
from convblocks.ops import apply_gates, channel_attention, spatial_attention
from tests.ops.common import SLOW, accuracy, dtype_pairs, with_grad

WEIGHT = r"weight of size \[1, 2, k, k\] with an odd k, got \[1, "
CASES = [
    pytest.param(info, o, *pair, id="-".join((info.name, str(i), *(str(d)[6:] for d in pair))))
    for info in COMPOSED.values()
    for i, o in enumerate(info.options)
    for pair in dtype_pairs(info)
]


@pytest.mark.parametrize(("info", "options", "dtype", "parameter_dtype"), CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_composed(
    info: OpInfo,
    options: Options,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    layout: str,
    backend: str,
    device: str,
) -> None:
    """Output and all gradients."""
    for size in info.sizes[1:2] if SLOW else info.sizes[:4]:
        sample = info.sample(size, options, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout, device=device)
        sample = with_grad(sample)
        grad = info.gradient(sample)
        results = run(info.op, sample, grad)
        assert [r.dtype for r in results] == [dtype, *(t.dtype for t in sample.tensors())]
        assert not accuracy(info, sample, results, grad)


def test_is_timms(backend: str, device: str) -> None:
    from timm.layers.cbam import SpatialAttn

    module = SpatialAttn(7).to(device).eval()
    x = torch.randn(2, 24, 9, 11, device=device)
    conv, norm = module.conv.conv, module.conv.bn
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    y = spatial_attention(x, conv.weight * scale, norm.bias - norm.running_mean * scale)
    torch.testing.assert_close(y, module(x))


@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_residual_and_gates(gate: str, backend: str, device: str) -> None:
    x, weight = torch.randn(2, 8, 5, 6, device=device), torch.randn(1, 2, 3, 3, device=device)
    channel = channel_attention(x, torch.randn(2, 8, device=device), None, torch.randn(8, 2, device=device), None)
    y = spatial_attention(x, weight, channel=channel, gate=gate)
    torch.testing.assert_close(spatial_attention(x, weight, channel=channel, gate=gate, residual=True), x + y)
    torch.testing.assert_close(y, spatial_attention(apply_gates(x, channel), weight, gate=gate))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        (
            {"weight": torch.zeros(1, 2, 4, 4)},
            ValueError,
            rf"{WEIGHT}2, 4",
        ),
        (
            {"weight": torch.zeros(1, 1, 3, 3)},
            ValueError,
            rf"{WEIGHT}1, 3",
        ),
        (
            {"weight": torch.zeros(1, 2, 3, 5)},
            ValueError,
            rf"{WEIGHT}2, 3",
        ),
        ({"weight": torch.zeros(1, 2, 3, 3).double()}, TypeError, "weight of dtype float32, got float64"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias of size \[1\], got \[2\]"),
        ({"gate": "tanh"}, ValueError, "gate to be one of sigmoid, hardsigmoid, got tanh"),
        ({"x": torch.zeros(3, 4, 5)}, ValueError, "a 4-D input"),
    ],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    call: dict[str, Any] = {"x": torch.zeros(2, 4, 5, 6), "weight": torch.zeros(1, 2, 3, 3), **changed}
    with pytest.raises(error, match=f"^spatial_attention: expected {words}"):
        spatial_attention(**call)
