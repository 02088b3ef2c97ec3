"""Inception-ResNet v2 against timm's; v1 by its counts and keys, and by the blocks that it shares with v2."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import convblocks
from convblocks.blocks.inception_resnet import InceptionResidual
from convblocks.models import create
from tests.models.common import assert_same, macs, parameters, randomised


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("inception_resnet_v2", {}, 55_843_464),
        ("inception_resnet_v1", {}, 23_995_624),
        ("inception_resnet_v1", {"num_classes": 0}, 23_482_624),
    ],
)
def test_parameters(name: str, options: dict[str, Any], count: int) -> None:
    assert parameters(name, **options) == count


def test_macs() -> None:
    assert macs("inception_resnet_v2", 299) == pytest.approx(13.156, abs=5e-4)


def _shorter(model: nn.Module) -> None:
    """Without the blocks that repeat others."""
    for name in ("repeat", "repeat_1", "repeat_2"):
        setattr(model, name, getattr(model, name)[:2])


def test_v2_is_timms() -> None:
    """The whole in float32; gradients without the blocks that repeat others."""
    ours = create("inception_resnet_v2", num_classes=7)
    theirs = timm.create_model("inception_resnet_v2", num_classes=7)
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), "timm", ours))
    x = torch.randn(2, 3, 107, 107)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    _shorter(ours)
    _shorter(theirs)
    for model in (ours, theirs):  # the norm after it takes away what it adds: in training its gradient is rounding
        model.block8.conv2d.bias.requires_grad_(False)
    ours.drop.p = 0.0
    assert_same(ours, randomised(lambda: theirs), "timm", x)


def test_reads_cadenes_weights() -> None:
    with torch.device("meta"):
        ours = create("inception_resnet_v2")
    sd = {k.replace("classif", "last_linear"): v for k, v in ours.state_dict().items()}
    assert convblocks.convert_state_dict(sd, model=ours).keys() == ours.state_dict().keys()


def test_v1_has_facenets_keys() -> None:
    with torch.device("meta"):
        sd = create("inception_resnet_v1", num_classes=7).state_dict()
    sizes = {
        "conv2d_4b.conv.weight": [256, 192, 3, 3],
        "repeat_1.4.branch2.2.conv.weight": [32, 32, 3, 3],
        "repeat_1.0.conv2d.bias": [256],
        "mixed_6a.branch1.1.bn.running_mean": [192],
        "repeat_2.9.branch1.1.conv.weight": [128, 128, 1, 7],
        "mixed_7a.branch2.2.conv.weight": [256, 256, 3, 3],
        "repeat_3.4.branch1.2.conv.weight": [192, 192, 3, 1],
        "block8.conv2d.weight": [1792, 384, 1, 1],
        "last_linear.weight": [512, 1792],
        "last_bn.running_var": [512],
        "logits.weight": [7, 512],
        "logits.bias": [7],
    }
    assert {key: list(sd[key].shape) for key in sizes} == sizes
    assert "last_linear.bias" not in sd


def test_v1s_embedding() -> None:
    """Without classes it is what these are made of, of norm 1."""
    whole = create("inception_resnet_v1", num_classes=4, embedding=8).eval()
    model = create("inception_resnet_v1", num_classes=0, embedding=8).eval()
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("logits")})
    x = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(y.norm(dim=1), torch.ones(2))
        whole.logits = nn.Identity()
        torch.testing.assert_close(y, nn.functional.normalize(whole(x)))


def _block(**options: Any) -> InceptionResidual:
    torch.manual_seed(0)
    block = convblocks.InceptionResNetB(6, [[4], [3, 4, 5]], 0.17, **options)
    assert isinstance(block, InceptionResidual)
    return block


def _formula(block: InceptionResidual, x: Tensor) -> Tensor:
    y = block.conv2d(torch.cat([block.branch0(x), block.branch1(x)], 1))
    y = y if block.se is None else block.se(y)
    y = x + block.scale * y
    return y.relu() if block.activation == "relu" else y


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": False}, {"attention": "simam"}])
def test_blocks_formula(train: bool, options: dict[str, Any]) -> None:
    """In evaluation one operation scales, adds and ends the block."""
    block, x = _block(**options).double().train(train), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    results = []
    for forward in (block, lambda x: _formula(block, x)):
        block.zero_grad()
        image = x.clone().requires_grad_()
        y = forward(image)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, image.grad, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(*results)


def test_half_precision() -> None:
    """Autocast makes the branch's dtype another than the input's."""
    block, x = _block().eval(), torch.randn(2, 6, 9, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = block(x)
    torch.testing.assert_close(got.float(), block(x), rtol=0.05, atol=0.05)
    with torch.no_grad():
        got = block.bfloat16()(x.bfloat16())
    torch.testing.assert_close(got.float(), block.float()(x), rtol=0.05, atol=0.05)


def test_drop_path() -> None:
    with torch.device("meta"):
        model = create("inception_resnet_v2", drop_path_rate=0.39)
    rates = [m.drop_path for m in model.modules() if isinstance(m, InceptionResidual)]
    assert rates == pytest.approx([0.01 * i for i in range(40)])
    block, x = _block(drop_path=0.5, activation=False), torch.randn(64, 6, 3, 3)
    skipped = (block(x) == x).flatten(1).all(1)
    assert 10 < int(skipped.sum()) < 54
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize(("name", "count"), [("inception_resnet_v1", 21), ("inception_resnet_v2", 40)])
def test_attention_is_in_each_block(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create(name, attention="se")
    blocks = [m for m in model.modules() if isinstance(m, InceptionResidual)]
    assert len(blocks) == count == len([m for m in model.modules() if isinstance(m, convblocks.SqueezeExcite)])
    assert [m.se.fc1.in_channels for m in blocks] == [m.in_channels for m in blocks]


def test_refuses_numbers() -> None:
    with pytest.raises(ValueError, match="InceptionResNetA: expected drop_path from 0 to below 1, got 1"):
        convblocks.InceptionResNetA(8, [[2]], drop_path=1.0)
    with pytest.raises(ValueError, match="expected out_channels to be a positive integer, got 0"):
        convblocks.InceptionResNetA(8, [[0]])
    with pytest.raises(ValueError, match="InceptionResNetC: expected in_channels to be a positive integer, got 0"):
        convblocks.InceptionResNetC(0, [[2]])
    with pytest.raises(ValueError, match="InceptionResNetC: expected 1 to 3 convolutions in a branch, got 4"):
        convblocks.InceptionResNetC(8, [[2, 2, 2, 2]])
    with pytest.raises(ValueError, match="InceptionResNetV1: expected embedding to be a positive integer, got 0"):
        create("inception_resnet_v1", embedding=0)
