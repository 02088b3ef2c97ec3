"""When a convolution and what follows it are one operation, and when they must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks import backends
from convblocks.blocks import fused

built = pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")


def _layers() -> fused.Layers:
    torch.manual_seed(0)
    layers = fused.Layers(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        convblocks.BatchNormAct2d(8, "silu"),
        convblocks.DepthwiseConv2d(8, kernel_size=3, padding=1, bias=False),
        convblocks.BatchNormAct2d(8, "leaky_relu", negative_slope=0.2),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding="same"),
    ).eval()
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.normal_(layer.running_mean)
            nn.init.normal_(layer.weight)
    return layers


def _plainly(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has run as one operation."""
    seen: list[str] = []
    run = fused._as_one

    def noted(conv: nn.Module, *args: Any) -> Tensor | None:
        y = run(conv, *args)
        if y is not None:
            seen.append("depthwise" if isinstance(conv, convblocks.DepthwiseConv2d) else "dense")
        return y

    monkeypatch.setattr(fused, "_as_one", noted)
    return seen


X = torch.randn(2, 3, 17, 15).contiguous(memory_format=torch.channels_last)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_inference(dtype: torch.dtype, calls: list[str]) -> None:
    layers, x = _layers().to(dtype), X.to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(layers(x), _plainly(layers, x))
    assert calls == ["dense", "depthwise", "dense"]


def test_with_gradients(calls: list[str]) -> None:
    layers = _layers()
    torch.testing.assert_close(layers(X), _plainly(layers, X), rtol=0, atol=0)
    assert not calls


def _hook(layers: Any) -> None:
    for layer in layers:
        layer.register_forward_hook(lambda *_: None)


def _prune(layers: Any) -> None:
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            prune.l1_unstructured(layer, "weight", 0.5)


def _train(layers: Any) -> None:
    layers.train()
    layers.requires_grad_(False)


@pytest.mark.parametrize("change", [_hook, _prune, _train])
def test_not_where_layers_do_something_else(change: Callable[[Any], None], calls: list[str]) -> None:
    layers, same = _layers(), _layers()
    change(layers)
    change(same)
    with torch.no_grad():
        torch.testing.assert_close(layers(X), _plainly(same, X), rtol=0, atol=0)
    assert "depthwise" not in calls  # which is never without its norm


def test_not_where_somebody_counts(calls: list[str]) -> None:
    layers = _layers()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layers(X)
    assert counter.get_total_flops() > 0
    assert not calls


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "1.running_mean"])
def test_nothing_is_kept(name: str) -> None:
    """What is written to a layer, even through ``.data``, holds for the next call."""
    layers = _layers()
    with torch.no_grad():
        before = layers(X)
        layers.state_dict(keep_vars=True)[name].data.add_(1)
        after = layers(X)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, _plainly(layers, X))


@built
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_side_by_side(layout: torch.memory_format) -> None:
    """Written where they belong; what cannot be is copied there, and what does not fit is concatenated."""
    layers = _layers()
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=layout)
    row = fused.Layers(layers[4], layers[5])
    with torch.no_grad():
        room = fused.Room(x, (6, 8))
        first = fused.run_into(row, x, room.parts[0])
        assert first.data_ptr() == room.filled((first, x)).data_ptr()
        torch.testing.assert_close(room.filled((first, x)), torch.cat((_plainly(row, x), x), 1))
        assert room.filled((first, x)).is_contiguous(memory_format=layout)
        row[0].register_forward_hook(lambda _, __, y: y + 1)
        hooked = fused.run_into(row, x, room.parts[0])
        torch.testing.assert_close(room.filled((hooked, x)), torch.cat((_plainly(row, x), x), 1))
        room = fused.Room(x, (5, 8))
        other = fused.run_into(row, x, room.parts[0])
        torch.testing.assert_close(room.filled((other, x)), torch.cat((_plainly(row, x), x), 1))
    assert fused.Room(x, (6, 8)).whole is None  # as gradients may be wanted


@pytest.mark.parametrize("name", ["resnet18", "unet", "parnet_s", "deeplabv3_resnet50"])
def test_networks_give_maps_in_the_layout_of_the_image(name: str) -> None:
    model = convblocks.models.create(name, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            maps = model(x.contiguous(memory_format=memory_format))
            assert all(y.is_contiguous(memory_format=memory_format) for y in maps)


class _Transposed(nn.Module):
    """An attention that gives a view of what it is given."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3)


def _wider_layer() -> nn.Module:
    block = convblocks.DenseBlock(8, 3, 4)
    block.denselayer2 = convblocks.DenseLayer(12, 5)
    block.denselayer3 = convblocks.DenseLayer(17, 4)
    return block


def _fire() -> nn.Module:
    block = convblocks.Fire(8, 4)
    block.expand3x3 = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1))
    return block


def _aspp() -> nn.Module:
    block = convblocks.ASPP(8, (2, 3), 8)
    block.project[0] = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False))
    return block


def _twice_the_same() -> nn.Module:
    act = nn.Hardswish()
    return fused.Layers(fused.Layers(nn.Conv2d(8, 8, 1), act, nn.Conv2d(8, 8, 1), act))


def _numbers_for_pairs() -> nn.Module:
    conv, depthwise = nn.Conv2d(8, 8, 3), convblocks.DepthwiseConv2d(8, 8, 3)
    conv.padding, depthwise.padding = 1, 1
    return fused.Layers(conv, nn.BatchNorm2d(8), depthwise, nn.BatchNorm2d(8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: convblocks.DenseBlock(8, 2, 4, attention=_Transposed),
        _wider_layer,
        _fire,
        _aspp,
        _twice_the_same,
        _numbers_for_pairs,
    ],
    ids=["view", "wider layer", "Fire", "ASPP", "twice the same", "numbers for pairs"],
)
def test_what_users_do_to_blocks(make: Callable[[], nn.Module]) -> None:
    """Inference gives what gradients are wanted of."""
    torch.manual_seed(0)
    block, x = make().eval(), torch.randn(2, 8, 6, 6)
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


def test_a_norm_without_variance_is_refused_by_torch() -> None:
    norm = nn.BatchNorm2d(8).eval()
    norm.running_var = None
    with torch.no_grad(), pytest.raises(RuntimeError, match="running_var must be defined"):
        fused.Layers(nn.Conv2d(4, 8, 1), norm).eval()(torch.randn(1, 4, 5, 5))
