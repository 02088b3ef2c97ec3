"""What is special about the channel shuffle; the shared tests do the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from convblocks.ops import channel_shuffle

each_format = pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


def test_the_order_of_the_paper(backend: str, device: str) -> None:
    x = torch.arange(12.0, device=device).view(1, 12, 1, 1)
    assert channel_shuffle(x, 3).flatten().tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@each_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [24, 60, 61, 112])
def test_same_bits_as_torch_and_undone_by_the_other_number(
    channels: int, dtype: torch.dtype, format_: torch.memory_format, backend: str, device: str
) -> None:
    x = torch.randn(2, channels, 5, 3, device=device).to(dtype).to(memory_format=format_)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("nan"), float("inf")
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for groups in (g for g in range(1, channels + 1) if channels % g == 0):
        y = channel_shuffle(x, groups)
        assert torch.equal(y.view(bits), F.channel_shuffle(x, groups).view(bits)), groups
        assert torch.equal(channel_shuffle(y, channels // groups).view(bits), x.view(bits)), groups
        assert y.is_contiguous(memory_format=format_)


def test_nothing_is_kept_for_the_backward(backend: str, device: str) -> None:
    x = torch.randn(2, 8, 5, 3, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = channel_shuffle(x, 2)
    assert not saved
    grad = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(channel_shuffle(grad_x, 2), grad)
