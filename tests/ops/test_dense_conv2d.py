"""Dense convolution: what the shared tests of all operations do not see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convblocks.ops import dense_conv2d
from convblocks.ops.dense_conv2d import reference


@pytest.mark.parametrize("channels_last_weight", [False, True])
@pytest.mark.parametrize(
    ("size", "out", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 3, 33, 31), 20, (7, 7), 2, 3, 1),  # few channels: whole rows, with both borders
        ((1, 3, 9, 2), 8, (3, 5), 1, 2, 1),  # a window wider than the map
        ((1, 31, 8, 8), 9, (3, 3), 1, (1, 0), 1),
        ((3, 40, 7, 7), 100, (1, 1), 1, 0, 1),
        ((1, 300, 7, 7), 33, (3, 3), 1, 1, 1),  # sums that are built from sums
        ((2, 24, 12, 12), 16, (3, 3), 3, 6, 6),  # taps that lie outside for every pixel of a row
        ((1, 16, 40, 40), 1, (1, 1), 1, 0, 1),
        ((1, 512, 5, 5), 512, (3, 3), 1, 1, 1),  # weights that the threads share out
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


def test_a_shift_alone_is_a_bias(backend: str, device: str) -> None:
    x, weight, bias = (torch.randn(s, device=device) for s in ((2, 8, 6, 6), (4, 8, 3, 3), (4,)))
    torch.testing.assert_close(dense_conv2d(x, weight, None, bias), F.conv2d(x, weight, bias))


def test_slices_are_read_where_they_are(backend: str, device: str) -> None:
    whole = torch.randn(2, 40, 9, 9, device=device).contiguous(memory_format=torch.channels_last)
    for part in (whole[:, 4:12], whole[:, :, 1:8, 2:9]):
        weight = torch.randn(5, part.shape[1], 3, 3, device=device)
        y = dense_conv2d(part, weight, padding=1)
        torch.testing.assert_close(y, reference(part, weight, padding=1), rtol=1e-4, atol=1e-4)
