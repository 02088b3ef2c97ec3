from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import convblocks
from convblocks.ops import depthwise_conv2d
from tests.ops.common import SLOW


@pytest.mark.parametrize("size", [(7, 7), (8, 13), (5, 2), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 1), (5, 1), (3, 2)])
def test_same_padding_is_that_of_tensorflow(
    size: tuple[int, int], stride: int, kernel: int, dilation: int, backend: str, device: str
) -> None:
    """A result of ceil(size / stride); the odd zero goes to the right and the bottom."""
    x, weight = torch.randn(1, 2, *size, device=device), torch.randn(2, 1, kernel, kernel, device=device)
    y = depthwise_conv2d(x, weight, stride=stride, padding="same", dilation=dilation)
    assert y.shape[2:] == tuple(-(-side // stride) for side in size)
    totals = [max(0, (-(-n // stride) - 1) * stride + dilation * (kernel - 1) + 1 - n) for n in size]
    (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    padded = nn.functional.pad(x, (left, right, top, bottom))
    torch.testing.assert_close(y, nn.functional.conv2d(padded, weight, None, stride, 0, dilation, 2))


def test_forms_of_the_numbers(backend: str, device: str) -> None:
    x, weight = torch.randn(2, 3, 9, 8, device=device), torch.randn(3, 1, 3, 5, device=device)
    expected = nn.functional.conv2d(x, weight, None, (2, 1), (1, 2), (1, 1), 3)
    for padding in ((1, 2), [1, 2], (2, 2, 1, 1)):
        torch.testing.assert_close(depthwise_conv2d(x, weight, stride=[2, 1], padding=padding), expected)
    expected = nn.functional.conv2d(x, weight, None, 2, 3, 2, 3)
    torch.testing.assert_close(depthwise_conv2d(x, weight, stride=2, padding=3, dilation=2), expected)


@pytest.mark.parametrize("channels", [17] if SLOW else [1, 3, 15, 16, 17, 33])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "width"),
    [
        *((3, 1, 1, 29), (3, 2, 1, 30), (5, 2, 1, 15), (7, 1, 1, 23), (3, 1, 2, 15), (5, 2, 3, 22)),
        *((5, 1, 1, 14), (5, 1, 1, 31), (5, 2, 1, 27), (5, 2, 1, 31), (7, 2, 1, 28), (7, 2, 1, 31)),
        (9 if SLOW else 31, 1, 1, 17),
    ],
)
def test_every_tile(
    kernel: int,
    stride: int,
    dilation: int,
    width: int,
    channels: int,
    layout: torch.memory_format,
    backend: str,
    device: str,
) -> None:
    """Whole and partial tiles of columns and of channels, with their gradients."""
    x = torch.randn(2, channels, 9, width, device=device, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(channels, 1, kernel, kernel, device=device, dtype=torch.float64)
    results = []
    for function in (depthwise_conv2d, nn.functional.conv2d):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        options = {} if function is depthwise_conv2d else {"groups": channels}
        y = function(a, w, stride=stride, padding=dilation * (kernel // 2), dilation=dilation, **options)  # type: ignore[operator]
        grad = torch.linspace(-1, 1, y.numel(), device=device, dtype=y.dtype).view(y.shape)
        results.append((y, *torch.autograd.grad(y, (a, w), grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_gradient_that_is_nan_reaches_taps_in_the_padding(backend: str, device: str) -> None:
    """They multiply it by the zeros there."""
    x = torch.randn(1, 2, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    y = convblocks.ops.depthwise_conv2d(x, weight, padding=1)
    grad = torch.zeros_like(y)
    grad[0, 0, 0, 0] = float("nan")
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    assert grad_weight[0].isnan().all()
    assert not grad_weight[1].isnan().any()
    assert grad_x[0, 0, :2, :2].isnan().all()
    assert not grad_x[0, 0, 2].isnan().any()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # whose kernels have ways of their own for these
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize(
    ("channels", "stride", "activation"),
    [
        (1, 1, "none"),
        (2, 1, "none"),
        (4, 1, "none"),
        (20, 1, "none"),
        (20, 2, "none"),
        (20, 1, "silu"),
        (20, 2, "silu"),
    ],
)
@pytest.mark.parametrize("strange", [None, "x", "weight", "grad"])
def test_planes(
    kernel: int, channels: int, stride: int, activation: str, strange: str | None, backend: str, device: str
) -> None:
    """As in float64, which has no such way, also of what is not finite."""
    for height, width in ((5, 17), (60, 47), (112, 80)):
        results = []
        values = {
            "x": torch.randn(2, channels, height, width, device=device),
            "weight": torch.randn(channels, 1, kernel, kernel, device=device),
            "grad": torch.randn(2, channels, -(-height // stride), -(-width // stride), device=device),
        }
        if strange is not None:
            values[strange][-1, -1, -1, -1] = float("inf")
        for dtype in (torch.float32, torch.float64):
            a, w = (values[name].to(dtype).requires_grad_() for name in ("x", "weight"))
            bias = torch.zeros(channels, device=device, dtype=dtype, requires_grad=True)
            y = depthwise_conv2d(a, w, bias, stride=stride, padding="same", activation=activation)
            results.append((y, *torch.autograd.grad(y, (a, w, bias), values["grad"].to(dtype))))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize("strange", [None, "x", "weight"])
def test_planes_of_halves(
    dtype: torch.dtype, kernel: int, stride: int, activation: str, strange: str | None, backend: str, device: str
) -> None:
    """Rounded once, and not before their sums are taken; of a slice of channels, and of bands that are all padding."""
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    tall = (1, 2, 40, 2000)
    for channels, multiplier, height, width, padding in (
        *((2, 1, 5, 17, 2), (3, 2, 13, 14, 1), (3, 1, 112, 113, "same")),
        *((1, 1, 70, 130, 1), (3, 1, 900, 13, 1), (3, 1, 30, 13, tall)),
    ):
        x = torch.randn(2, channels + 1, height, width, device=device, dtype=dtype)[:, 1:]
        weight = torch.randn(channels * multiplier, 1, kernel, kernel, device=device, dtype=dtype)
        bias = torch.randn(channels * multiplier, device=device, dtype=dtype)
        if strange is not None:
            {"x": x, "weight": weight}[strange][-1, -1, -1, -1] = float("inf")
        convolve = functools.partial(depthwise_conv2d, stride=stride, padding=padding, activation=activation)
        y, sums = convolve(x, weight, bias, sums=True)
        exact, exact_sums = convolve(x.double(), weight.double(), bias.double(), sums=True)
        torch.testing.assert_close(y.double(), exact, rtol=1.01 * rounding, atol=2e-5, equal_nan=True)
        torch.testing.assert_close(sums.double(), exact_sums, rtol=1e-5, atol=1e-2, equal_nan=True)
        for same, like in ((convolve(x, weight, bias), y), (convolve(x[1:], weight, bias), y[1:])):
            torch.testing.assert_close(same, like, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_sample_is_as_it_is_alone(stride: int, backend: str, device: str) -> None:
    """Among so many that the caches do not hold them."""
    x = torch.randn(64, 16, 112, 112, device=device)
    weight = torch.randn(16, 1, 3, 3, device=device)
    results = []
    for some in (x, x[:1]):
        some = some.clone().requires_grad_()
        y = depthwise_conv2d(some, weight, stride=stride, padding=1)
        results.append((y, *torch.autograd.grad(y, some, torch.ones_like(y))))
    for all_of_it, one in zip(*results, strict=True):
        assert torch.equal(all_of_it[:1], one)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [((1, 150, 44, 40), 3, 1), ((2, 150, 33, 57), 3, 2), ((7, 340, 14, 14), 5, 1), ((9, 40, 7, 7), 3, 1)],
)
def test_gradients_in_channels_last(
    size: tuple[int, ...], kernel: int, stride: int, activation: str, backend: str, device: str
) -> None:
    """Of bands of rows, of parts of the channels and of several samples together."""
    values = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
    weights, biases = torch.randn(size[1], 1, kernel, kernel, device=device), torch.randn(size[1], device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (values, weights, biases)]
        y = depthwise_conv2d(*inputs, stride=stride, padding=kernel // 2, activation=activation)
        grad = torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view(y.permute(0, 2, 3, 1).shape)
        results.append((y, *torch.autograd.grad(y, inputs, grad.permute(0, 3, 1, 2))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("activation", ["relu6", "silu", "hardswish"])
def test_threads_write_no_channel_twice(activation: str, backend: str, device: str) -> None:
    """Of channels that end in a part of a vector; an activation that is made in place would be made again."""
    threads = torch.get_num_threads()
    try:
        for size in ((1, 24, 1, 5000), (1, 12, 5, 500), (1, 40, 3, 400), (3, 24, 1, 512)):
            x = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(size[1], 1, 3, 3, device=device)
            results = []
            for number in (1, 2, 4, 8, 2, 4, 8):
                torch.set_num_threads(number)
                results.append(depthwise_conv2d(x, weight, padding=1, activation=activation))
            assert all(torch.equal(y, results[0]) for y in results)
    finally:
        torch.set_num_threads(threads)
