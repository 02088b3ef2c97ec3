"""Dense convolution: what the shared tests of all operations do not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from convblocks.opinfo import LAYOUTS
from convblocks.ops import dense_conv2d
from convblocks.ops.dense_conv2d import reference
from tests.ops.common import both_layouts


@pytest.mark.parametrize("channels_last_weight", [False, True])
@pytest.mark.parametrize(
    ("size", "out", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 3, 33, 31), 20, (7, 7), 2, 3, 1),  # few channels: whole rows, with both borders
        ((1, 3, 9, 2), 8, (3, 5), 1, 2, 1),  # a window wider than the map
        ((1, 31, 8, 8), 9, (3, 3), 1, (1, 0), 1),
        ((3, 40, 7, 7), 100, (1, 1), 1, 0, 1),
        ((1, 300, 7, 7), 33, (3, 3), 1, 1, 1),  # sums that are built from sums
        ((1, 64, 5, 5), 1, (3, 3), 1, 1, 1),  # the same, of few weights
        ((2, 24, 12, 12), 16, (3, 3), 3, 6, 6),  # taps that lie outside for every pixel of a row
        ((1, 300, 9, 13), 33, (3, 3), 1, 8, 8),  # for most pixels, in sums that are built from sums
        ((1, 1100, 8, 8), 8, (3, 3), 1, 9, 9),  # for all pixels, all but one
        ((1, 16, 40, 40), 1, (1, 1), 1, 0, 1),
        ((1, 512, 5, 5), 512, (3, 3), 1, 1, 1),  # weights that the threads share out
        ((2, 64, 14, 14), 80, (3, 3), 1, 1, 1),  # columns at the borders are taken together
        ((1, 64, 9, 30), 144, (1, 7), 1, (0, 3), 1),
        ((1, 64, 41, 13), 40, (3, 3), 2, 2, 2),
    ],
)
def test_as_torch_in_channels_last(
    size: tuple[int, ...],
    out: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int | tuple[int, int],
    dilation: int,
    channels_last_weight: bool,
    backend: str,
    device: str,
) -> None:
    x = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, size[1], *kernel, device=device) / (size[1] * kernel[0] * kernel[1]) ** 0.5
    if channels_last_weight:
        weight = weight.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(out, device=device) + 0.5, torch.randn(out, device=device)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    exact = F.conv2d(x.double(), weight.double(), None, **how) * scale[:, None, None] + shift[:, None, None]
    y = dense_conv2d(x, weight, scale, shift, activation="relu", **how)
    torch.testing.assert_close(y, exact.relu().float(), rtol=1e-4, atol=2e-5)
    if out > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # which takes the pixels of a line together
@pytest.mark.parametrize(("channels", "out"), [(8, 1), (9, 8), (16, 16), (10, 17), (20, 32), (33, 3)])
@pytest.mark.parametrize(
    ("height", "kernel", "stride", "padding", "dilation"),
    [(9, 3, 1, 1, 1), (9, 1, 1, 0, 1), (11, 5, (2, 1), (3, 1), 1), (9, 3, (2, 1), (2, 2), (2, 1))],
)
@both_layouts
def test_kernels_three_wide_of_few_channels(
    channels: int,
    out: int,
    height: int,
    kernel: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    layout: str,
    backend: str,
    device: str,
) -> None:
    """Of lines of all lengths; of a sample the same in any batch."""
    weight = torch.randn(out, channels, kernel, 3, device=device) / (3 * channels * kernel) ** 0.5
    shift = torch.randn(out, device=device)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    for width in (3, 7, 8, 14, 15, 29, 56):
        x = LAYOUTS[layout](torch.randn(3, channels, height, width, device=device))
        exact = F.conv2d(x.double(), weight.double(), shift.double(), **how)
        y = dense_conv2d(x, weight, None, shift, activation="silu", **how)
        torch.testing.assert_close(y, F.silu(exact).float(), rtol=1e-4, atol=2e-5)
        one = dense_conv2d(x[1:2], weight, None, shift, activation="silu", **how)
        assert torch.equal(y[1:2], one)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # on the others torch convolves
@both_layouts
def test_weights_that_are_not_finite_show(layout: str, backend: str) -> None:
    """Wherever the pixels are, and whichever are taken together: taps that lie outside meet zeros."""
    x = LAYOUTS[layout](torch.rand(2, 64, 5, 5))
    weight = torch.rand(64, 64, 3, 3)
    weight[:, :, 0] = float("nan")
    for sample in (x, x[:1], x[1:]):
        assert dense_conv2d(sample, weight, padding=2, dilation=(2, 1)).isnan().all()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)  # on the others torch convolves
@both_layouts
@pytest.mark.parametrize(("size", "out"), [((3, 512, 5, 5), 512), ((2, 300, 5, 7), 70), ((3, 64, 7, 7), 64)], ids=str)
def test_whoever_shares_the_work(size: tuple[int, ...], out: int, layout: str, backend: str) -> None:
    """Threads share pixels or output channels, samples a block: a sample's result is the same with all of them."""
    x, weight = LAYOUTS[layout](torch.randn(size)), torch.randn(out, size[1], 3, 3)
    y = dense_conv2d(x, weight, padding=1)
    assert torch.equal(dense_conv2d(x[1:2], weight, padding=1), y[1:2])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(dense_conv2d(x, weight, padding=1), y)
    finally:
        torch.set_num_threads(before)


@both_layouts
@pytest.mark.parametrize(
    ("size", "kernel", "how"),
    [
        ((1, 64, 9, 6), 3, {"padding": (8, 1), "dilation": (8, 1)}),  # lines of padding only
        ((2, 70, 11, 5), 3, {"padding": (2, 0), "dilation": (3, 1), "stride": (2, 1)}),
        ((1, 80, 40, 41), 1, {"stride": 3, "padding": 1}),
        ((1, 64, 5, 5), 3, {"stride": 2**30, "padding": 1}),
        ((1, 8, 5, 5), 3, {"stride": 2**30}),
    ],
    ids=str,
)
def test_lines_that_few_taps_meet(
    size: tuple[int, ...], kernel: int, how: dict[str, Any], layout: str, backend: str, device: str
) -> None:
    x = LAYOUTS[layout](torch.randn(size, device=device))
    weight = torch.randn(20, size[1], kernel, kernel, device=device)
    exact = F.conv2d(x.double(), weight.double(), **how).float()
    torch.testing.assert_close(dense_conv2d(x, weight, **how), exact, rtol=1e-4, atol=1e-4)


def test_a_shift_alone_is_a_bias(backend: str, device: str) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((2, 8, 6, 6), (4, 8, 3, 3), (4,)))
    torch.testing.assert_close(dense_conv2d(x, weight, None, bias), F.conv2d(x, weight, bias))


def test_slices_are_read_where_they_are(backend: str, device: str) -> None:
    whole = torch.randn(2, 40, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    for part in (whole[:, 4:12], whole[:, :, 1:8, 2:9], whole[:, 3:4], whole[:, ::40]):
        weight = torch.randn(5, part.shape[1], 3, 3, device=device)
        y = dense_conv2d(part, weight, padding=1)
        torch.testing.assert_close(y, reference(part, weight, padding=1), rtol=1e-4, atol=1e-4)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("size", "out", "kernel", "stride"),
    [
        *(((1, 9, 6, 5), out, 1, 1) for out in (1, 7, 8, 9, 16, 17, 24, 25, 33, 40, 49, 72)),
        *(((2, 5, 9, 11), out, 3, 2) for out in (6, 20, 24, 56)),
        ((1, 300, 5, 7), 70, 3, 1),  # more weights than are laid out together
        ((3, 700, 3, 3), 130, 1, 1),
        ((1, 70, 40, 33), 20, (5, 1), (1, 3)),  # several stretches of pixels
        ((2, 24, 61, 37), 16, (1, 7), 1),
    ],
    ids=str,
)
def test_every_width(
    size: tuple[int, ...],
    out: int,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    backend: str,
    device: str,
) -> None:
    """Of output channels in vectors; with a residual, and a slice of more channels as the input."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, dtype=dtype).to(device)

    k = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = LAYOUTS[layout](random(size[0], size[1] + 3, *size[2:]))[:, 1:-2]
    weight, scale, shift = random(out, size[1], *k) / size[1] ** 0.5, random(out), random(out)
    padding = (k[0] // 2, k[1] // 2)
    plain = F.conv2d(x, weight, None, stride, padding) * scale[:, None, None] + shift[:, None, None]
    residual = LAYOUTS[layout](random(*plain.shape))
    y = dense_conv2d(x, weight, scale, shift, residual=residual, stride=stride, padding=padding, activation="relu")
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(y, (plain + residual).relu(), **tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)  # the others are GPUs'
@pytest.mark.parametrize("size", [(1, 64, 1, 1), (2, 9, 5, 1), (1, 64, 1, 2)], ids=str)
def test_gradient_of_maps_that_the_stride_exceeds(size: tuple[int, ...], backend: str, device: str) -> None:
    """torch's own, in bfloat16 with AVX-512, reads memory that nothing was written to."""
    torch.manual_seed(0)
    x = torch.randn(size, device=device, dtype=torch.bfloat16)
    weight = torch.randn(16, size[1], 3, 3, device=device, dtype=torch.bfloat16, requires_grad=True)
    stride = size[3] + 1
    expected = torch.nn.grad.conv2d_weight(
        x.double(), weight.shape, torch.ones(F.conv2d(x, weight, None, stride, 1).shape).double().to(device), stride, 1
    )
    for _ in range(10):
        dirt = [torch.full((count,), float("nan"), device=device) for count in (100, 1000, 10_000, 100_000)]
        del dirt  # what the next allocations find
        dense_conv2d(x, weight, stride=stride, padding=1).sum().backward()
        torch.testing.assert_close(weight.grad.double(), expected, rtol=0.02, atol=0.02)
        weight.grad = None


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_gradient_of_a_single_pixel_is_all_that_its_memory_holds(backend: str) -> None:
    x, weight = torch.randn(1, 70, 5, 5, requires_grad=True), torch.randn(20, 70, 5, 5)
    (grad,) = torch.autograd.grad(dense_conv2d(x, weight).sum(), x)
    assert grad.untyped_storage().nbytes() == grad.nbytes
