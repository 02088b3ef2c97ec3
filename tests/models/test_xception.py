"""Xception against timm's."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import timm
import torch
from timm.models.xception import Block
from torch import nn

import convblocks
from convblocks.models import create
from convblocks.models.xceptions import Xception
from tests.models.common import assert_same, macs, parameters, randomised


def test_parameters() -> None:
    assert parameters("xception") == 22_855_952


def test_macs() -> None:
    assert macs("xception", 299) == pytest.approx(8.357, abs=5e-4)


def test_is_timms() -> None:
    """The whole in float32; gradients without the blocks that repeat others."""
    ours, theirs = create("xception", num_classes=7), timm.create_model("legacy_xception", num_classes=7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        for i in range(6, 12):
            setattr(model, f"block{i}", nn.Identity())
    ours.drop.p = 0.0
    assert_same(ours, randomised(lambda: theirs), "timm", x[:, :, :48, :48])


def test_reads_cadenes_weights() -> None:
    with torch.device("meta"):
        ours = create("xception")
    sd = {("last_linear" + k[2:] if k.startswith("fc.") else k): v for k, v in ours.state_dict().items()}
    for source in ("official", None):
        assert convblocks.convert_state_dict(sd, source, ours).keys() == ours.state_dict().keys()


def test_is_no_module() -> None:
    """Though its file has its name."""
    assert isinstance(convblocks.models.xception(num_classes=2, attention="simam"), Xception)
    assert pickle.loads(pickle.dumps(convblocks.models.xception)) is convblocks.models.xception


def _theirs(*numbers: int, attention: str | None = None, **options: Any) -> nn.Module:
    assert attention in (None, "simam")  # which has no keys
    block = Block(*numbers, **options)
    if attention is not None:
        block.rep.append(convblocks.SimAM())
    return block


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("numbers", "options"),
    [
        ((6, 6, 3, 1), {}),
        ((6, 6, 3, 1), {"attention": "simam"}),
        ((6, 8, 2, 2), {"start_with_relu": False}),
        ((6, 8, 2, 2), {"grow_first": False, "attention": "simam"}),
        ((6, 8, 1, 1), {}),
        ((6, 6, 2, 3), {}),
    ],
)
def test_block_is_timms(numbers: tuple[int, ...], options: dict[str, Any], train: bool) -> None:
    theirs = randomised(lambda: _theirs(*numbers, **options)).double().train(train)
    ours = convblocks.XceptionBlock(*numbers, **options).double().train(train)
    ours.load_state_dict(theirs.state_dict())
    x, results = torch.randn(2, 6, 9, 8, dtype=torch.float64), []
    for block in (ours, theirs):
        image = x.clone().requires_grad_()
        y = block(image)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        own = dict(block.named_parameters())
        results.append([y, image.grad, *(own[name].grad for name in sorted(own))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("block", [convblocks.XceptionBlock, convblocks.BasicBlock])
def test_half_precision(block: type[nn.Module]) -> None:
    """Autocast makes the branch's dtype another than the input's."""
    torch.manual_seed(0)
    made, x = block(6, 6).eval(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        expected = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(made(x).float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(made.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_drop_path() -> None:
    with torch.device("meta"):
        model = create("xception", drop_path_rate=0.11)
    assert [getattr(model, f"block{i}").drop_path for i in range(1, 13)] == pytest.approx([0.01 * i for i in range(12)])
    block, x = convblocks.XceptionBlock(6, 6, drop_path=0.5), torch.randn(64, 6, 3, 3)
    skipped = (block(x) == x).flatten(1).all(1)
    assert 10 < int(skipped.sum()) < 54
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_attention_is_in_each_block() -> None:
    with torch.device("meta"):
        model = create("xception", attention="se")
    blocks = [m for m in model.modules() if isinstance(m, convblocks.XceptionBlock)]
    assert [m.se.fc1.in_channels for m in blocks] == [128, 256, *[728] * 9, 1024]


def test_norm_eps() -> None:
    with torch.device("meta"):
        model = create("xception", norm_eps=1e-3)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}


def test_refuses_numbers() -> None:
    for position, name in enumerate(("in_channels", "out_channels", "layers", "stride")):
        numbers = [4, 4, 4, 4]
        numbers[position] = 0
        with pytest.raises(ValueError, match=f"XceptionBlock: expected {name} to be a positive integer, got 0"):
            convblocks.XceptionBlock(*numbers)
    with pytest.raises(ValueError, match="XceptionBlock: expected drop_path from 0 to below 1, got 1"):
        convblocks.XceptionBlock(4, 4, drop_path=1.0)
    with pytest.raises(ValueError, match="XceptionBlock: expected attention to be one of"):
        create("xception", attention="sea")
