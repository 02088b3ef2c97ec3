"""What is special about concat_shuffle; the shared tests do the rest."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convblocks.ops import channel_shuffle, concat_shuffle
from tests.ops.common import SLOW, affordable

each_format = pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Equal and not, in streams longer and shorter than vectors, cut by the end of a map or not, with maps of no channels.
CHANNELS = [(58, 58), (116, 116), (24, 40), (0, 6), (7, 0, 5), (3, 5, 4), (33, 32, 31), (64, 32, 48, 16), (3,) * 20]


def test_the_channels_of_two_maps_alternate(backend: str, device: str) -> None:
    left, right = torch.arange(8.0, device=device).view(2, 1, 4, 1, 1)
    assert concat_shuffle([left, right], 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@each_format
@pytest.mark.parametrize("dtype", affordable([torch.float64, torch.float32, torch.bfloat16, torch.float16], 1), ids=str)
@pytest.mark.parametrize("channels", affordable(CHANNELS, 4, "channels"), ids=str)
def test_same_bits_as_torch_for_every_number_of_groups(
    channels: tuple[int, ...], dtype: torch.dtype, format_: torch.memory_format, backend: str, device: str
) -> None:
    maps = [torch.randn(2, c, 5, 3, device=device).to(dtype).to(memory_format=format_) for c in channels]
    maps[-1][0, 0, 0, 0], maps[-1][1, 0, 1, 1] = float("nan"), float("inf")
    maps = [t.requires_grad_() for t in maps]
    total = sum(channels)
    divisors = [g for g in range(1, total + 1) if total % g == 0]
    for groups in affordable(divisors, 6, str(channels)):
        y, expected = concat_shuffle(maps, groups), F.channel_shuffle(torch.cat(maps, 1), groups)
        grad = torch.randn_like(y)
        results = (y, *torch.autograd.grad(y, maps, grad))
        for got, want in zip(results, (expected, *torch.autograd.grad(expected, maps, grad)), strict=True):
            assert torch.equal(got.view(BITS[dtype.itemsize]), want.view(BITS[dtype.itemsize])), groups


def test_one_map_is_a_channel_shuffle(backend: str, device: str) -> None:
    x = torch.randn(2, 12, 5, 3, device=device)
    assert torch.equal(concat_shuffle((x,), 3), channel_shuffle(x, 3))


LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: torch.cat((x, x), 1)[:, x.shape[1] :],
    "crop": lambda x: F.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
}


@pytest.mark.parametrize("layouts", affordable(list(itertools.product(LAYOUTS, repeat=2)), 4), ids="-".join)
def test_maps_of_different_layouts(layouts: tuple[str, str], backend: str, device: str) -> None:
    """The first map says that of the output, the gradient that of the gradients."""
    maps = [torch.randn(2, 8, 5, 3, device=device, requires_grad=True) for _ in layouts]
    placed = [LAYOUTS[name](t) for name, t in zip(layouts, maps, strict=True)]
    y = concat_shuffle(placed, 2)
    assert torch.equal(y, F.channel_shuffle(torch.cat(maps, 1), 2))
    assert y.is_contiguous(memory_format=torch.channels_last if layouts[0] == "nhwc" else torch.contiguous_format)
    grad = torch.randn_like(y)
    for part, want in zip(torch.autograd.grad(y, maps, grad), _parts(grad), strict=True):
        assert torch.equal(part, want)


def _parts(grad: Tensor) -> tuple[Tensor, Tensor]:
    return grad[:, ::2], grad[:, 1::2]


def test_the_halves_of_a_map_are_read_where_they_are(backend: str, device: str) -> None:
    """As in a unit of ShuffleNet V2 of stride 1; also one map in several places."""
    x = torch.randn(2, 16, 5, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    left, right = x.chunk(2, 1)
    y = concat_shuffle([left, right, left], 3)
    assert torch.equal(y, F.channel_shuffle(torch.cat([left, right, left], 1), 3))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.cat([2 * torch.ones_like(left), torch.ones_like(right)], 1))


@pytest.mark.parametrize("wanted", itertools.product([False, True], repeat=3), ids=str)
def test_only_maps_that_want_a_gradient_get_one(wanted: tuple[bool, ...], backend: str, device: str) -> None:
    maps = [torch.randn(1, 4, 2, 2, device=device, requires_grad=w) for w in wanted]
    y = concat_shuffle(maps, 2)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    for t, w in zip(maps, wanted, strict=True):
        assert torch.equal(t.grad, torch.ones_like(t)) if w else t.grad is None


@pytest.mark.skipif(SLOW, reason="nothing differs here")
def test_streams_of_every_length(backend: str, device: str) -> None:
    """Channels of whole vectors, with an end of any length, and fewer than a vector; woven and unwoven."""
    for length, few, dtype in itertools.product(range(1, 70), (2, 4, 8), (torch.float32, torch.bfloat16)):
        maps = [torch.randn(1, length, 2, 3, device=device, dtype=dtype) for _ in range(few)]
        maps = [t.to(memory_format=torch.channels_last) for t in maps]
        for groups in (few, length):
            assert torch.equal(concat_shuffle(maps, groups), F.channel_shuffle(torch.cat(maps, 1), groups))
