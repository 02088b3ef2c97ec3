"""What is special about global context: it is timm's and the official block; attention that only one pixel gets. The
shared tests do the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import GlobalContext
from torch import Tensor

from convblocks.accuracy import run
from convblocks.opinfo import OPS
from convblocks.ops import global_context
from tests.ops.common import accuracy, both_layouts, once


def _timm(m: Any, x: Tensor) -> Tensor:
    def transform(mlp: Any) -> tuple[Any, ...]:
        if mlp is None:
            return (None,) * 6
        return (
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.norm.weight,
            mlp.norm.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
        )

    attention = (None, None) if m.conv_attn is None else (m.conv_attn.weight, m.conv_attn.bias)
    return global_context(x, *attention, *transform(m.mlp_scale), *transform(m.mlp_add), eps=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"fuse_add": True, "fuse_scale": False}, {"fuse_add": True}, {"use_attn": False}],
    ids=["scale", "add", "both", "mean"],
)
def test_equals_timm(options: dict[str, Any], backend: str, device: str) -> None:
    module = GlobalContext(24, rd_channels=5, **options).to(device)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(2, 24, 9, 7, device=device, requires_grad=True)
    y, expected = _timm(module, x), module(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(x)
    got, want = (torch.autograd.grad(t, (x, *module.parameters()), grad) for t in (y, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@both_layouts
@pytest.mark.parametrize("rise", [1, -1])
def test_logits_that_rise_and_fall(rise: int, layout: str, backend: str, device: str) -> None:
    """By thousands along the pixels: each chunk of them has another maximum, and nearly all attention goes to one."""
    info = OPS["global_context"]
    sample = info.sample((2, 8, 40, 31), layout=layout, device=device)
    ramp = rise * torch.linspace(-1000, 1000, 40 * 31, device=device).reshape(1, 1, 40, 31)
    sample = sample.map_maps(lambda x: x + ramp * torch.ones_like(x))
    grad = info.gradient(sample)
    results = run(info.op, sample, grad)
    assert all(r.isfinite().all() for r in results)
    assert not accuracy(info, sample, results, grad)


@both_layouts
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_logits_of_half_precision(sign: int, layout: str, backend: str, device: str) -> None:
    """Of 60000 and -60000: neither their exponentials nor their differences are float16's."""
    info = OPS["global_context"]
    sample = info.sample((2, 8, 40, 31), dtype=torch.float16, layout=layout, device=device)
    x, attn_weight = sample.args[:2]
    with torch.no_grad():
        x[:, 0] = -60000
        x[:, 0, 5:21] = 60000
        attn_weight.zero_().flatten()[0] = sign
    grad = info.gradient(sample) / 8  # those of the layers would else be too large for float16
    results = run(info.op, sample, grad)
    assert all(r.isfinite().all() for r in results)
    assert not accuracy(info, sample, results, grad)


@both_layouts
def test_logits_of_no_attention(layout: str, backend: str, device: str) -> None:
    """They overflow to -Inf in so many pixels that some chunks have no others."""
    info = OPS["global_context"]
    sample = info.sample((2, 8, 40, 41), layout=layout, device=device)
    x, attn_weight, *rest = sample.args
    with torch.no_grad():
        x[:, 0].flatten(1)[:, :1600] = -3e38
        attn_weight.flatten()[0] = 10
    y = info.op(x, attn_weight, *rest, **sample.kwargs)
    exact = info.reference(*(t if t is None else t.double() for t in sample.args), **sample.kwargs)
    torch.testing.assert_close(y, exact.float(), rtol=1e-4, atol=1e-4)


@once
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@both_layouts
def test_a_sample_is_as_it_is_alone(layout: str, backend: str, device: str) -> None:
    """Among so many that the caches do not hold them."""
    info = OPS["global_context"]
    sample = info.sample((128, 64, 28, 28), layout=layout, device=device)
    alone = sample.map_maps(lambda x: x[:1])
    grad = info.gradient(sample)
    for all_of_it, one in zip(run(info.op, sample, grad)[:2], run(info.op, alone, grad[:1])[:2], strict=True):
        assert torch.equal(all_of_it[:1], one)


def test_weights_of_linear_layers_and_of_convolutions_are_the_same(backend: str, device: str) -> None:
    info = OPS["global_context"]
    sample = info.sample((2, 8, 6, 5), {"fuse": "both"}, device=device)
    shaped = sample.map(lambda t: t[..., None, None] if t.dim() == 2 else t)
    assert torch.equal(info.op(*sample.args), info.op(*shaped.args))
