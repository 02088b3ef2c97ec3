"""What is special about scale_shift_act, writing over its input; the shared tests do the rest."""

from __future__ import annotations

import re

import pytest
import torch

from convblocks.opinfo import LAYOUTS
from convblocks.ops import scale_shift_act
from convblocks.ops.scale_shift_act import reference

INPLACE = [name for name in LAYOUTS if "expanded" not in name]


def _channels(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(9, device=device), torch.randn(9, device=device)


@pytest.mark.parametrize("residual_layout", [None, "contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", INPLACE)
def test_in_place(layout: str, residual_layout: str | None, backend: str, device: str) -> None:
    """The input itself is returned, and what lies around it in memory stays."""
    x = LAYOUTS[layout](torch.randn(2, 9, 6, 5, device=device))
    residual = None if residual_layout is None else LAYOUTS[residual_layout](torch.randn(2, 9, 6, 5, device=device))
    scale, shift = _channels(device)
    expected = reference(x, scale, shift, residual, "relu")
    whole = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0)
    before, inside = whole.clone(), torch.zeros_like(whole)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(1)
    version = x._version
    y = scale_shift_act(x, scale, shift, activation="relu", residual=residual, inplace=True)
    assert y is x
    assert x._version > version
    torch.testing.assert_close(x, expected)
    assert torch.equal(whole[inside == 0], before[inside == 0])


def test_the_input_as_its_own_residual(backend: str, device: str) -> None:
    x, (scale, shift) = torch.randn(2, 9, 6, 5, device=device), _channels(device)
    expected = reference(x, scale, shift, x)
    torch.testing.assert_close(scale_shift_act(x, scale, shift, residual=x, inplace=True), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_inputs_in_the_memory_of_the_input(layout: torch.memory_format, backend: str, device: str) -> None:
    whole = torch.randn(2, 18, 16, 16, device=device).to(memory_format=layout)
    x, residual, scale, shift = whole[:, :9], whole[:, 4:13], whole[0, :9, 0, 0], whole[1, :9, 3, 3]
    expected, rest = reference(x, scale, shift, residual, "relu"), whole[:, 9:].clone()
    scale_shift_act(x, scale, shift, activation="relu", residual=residual, inplace=True)
    torch.testing.assert_close(x, expected)
    assert torch.equal(whole[:, 9:], rest)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("height", "width"), [(7, 7), (3, 5), (1, 1)])
def test_short_planes(height: int, width: int, activation: str, backend: str, device: str) -> None:
    """Planes that end in a part of a vector, which the CPU takes together; of a sample the same in any batch."""
    whole = torch.randn(5, 120, height, width, device=device)
    x, residual = whole[:, 7:107], torch.randn(5, 100, height, width, device=device)
    scale, shift = torch.randn(2, 100, device=device)
    y = scale_shift_act(x, scale, shift, activation=activation, residual=residual)
    torch.testing.assert_close(y, reference(x, scale, shift, residual, activation))
    alone = [
        scale_shift_act(x[i : i + 1], scale, shift, activation=activation, residual=residual[i : i + 1])
        for i in range(5)
    ]
    if backend == "cpu":
        assert torch.equal(y, torch.cat(alone))
    before = whole.clone()
    scale_shift_act(x, scale, shift, activation=activation, residual=residual, inplace=True)
    before[:, 7:107] = y
    assert torch.equal(whole, before)


@pytest.mark.parametrize("size", [(0, 9, 6, 5), (2, 9, 0, 5)])
def test_nothing_in_place(size: tuple[int, ...], backend: str, device: str) -> None:
    x, (scale, shift) = torch.randn(size, device=device), _channels(device)
    assert scale_shift_act(x, scale, shift, inplace=True) is x


@pytest.mark.parametrize("which", ["an input", "a scale", "a shift", "a residual"])
def test_in_place_where_a_gradient_is_wanted(which: str, backend: str, device: str) -> None:
    x, residual = torch.randn(2, 2, 9, 6, 5, device=device)
    scale, shift = _channels(device)
    before = x.clone()
    {"an input": x, "a scale": scale, "a shift": shift, "a residual": residual}[which].requires_grad_()
    words = f"^scale_shift_act: expected inplace only where no gradient is wanted, got {which} that requires it$"
    with pytest.raises(ValueError, match=words):
        scale_shift_act(x, scale, shift, residual=residual, inplace=True)
    assert torch.equal(x, before)
    with torch.no_grad():
        scale_shift_act(x, scale, shift, residual=residual, inplace=True)


def test_in_place_where_elements_share_memory(backend: str, device: str) -> None:
    scale, shift = _channels(device)
    x = torch.randn(1, 9, 6, 5, device=device)
    for bad in (x.expand(2, -1, -1, -1), x.as_strided((1, 9, 6, 5), (270, 30, 4, 1)), x[..., :1].expand(1, 9, 6, 4)):
        words = f"elements share no memory, got strides {list(bad.stride())} for size {list(bad.shape)}"
        with pytest.raises(
            ValueError, match=re.escape(f"scale_shift_act: expected inplace only for an input whose {words}")
        ):
            scale_shift_act(bad, scale, shift, inplace=True)


def test_in_place_says_the_same_words(backend: str, device: str) -> None:
    scale, shift = _channels(device)
    with pytest.raises(ValueError, match=r"^scale_shift_act: expected scale of size \[8\], got \[9\]"):
        scale_shift_act(torch.randn(2, 8, 6, 5, device=device), scale, shift, inplace=True)


def test_in_place_in_a_compiled_graph(backend: str, device: str) -> None:
    x, (scale, shift) = torch.randn(2, 9, 6, 5, device=device), _channels(device)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        scale_shift_act(y, scale, shift, activation="silu", inplace=True)
        return y + 1

    expected = reference(x * 2, scale, shift, None, "silu") + 1
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
