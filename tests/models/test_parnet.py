"""ParNet against its formulas, written down once more: no package has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convblocks
from convblocks import ParNetBlock, ParNetFusion
from convblocks.models import create
from convblocks.models.parnet import ParNet
from tests.models.common import randomised

COUNTS = {
    "parnet_s": (20_930_936, 19_128_980),
    "parnet_m": (38_953_256, 35_576_616),
    "parnet_l": (60_180_008, 54_914_824),
    "parnet_xl": (93_176_168, 84_962_784),
}


class Formula:
    """What a state dict with the authors' keys computes."""

    def __init__(self, sd: dict[str, Tensor], training: bool) -> None:
        self.sd, self.training = sd, training

    def norm(self, key: str, x: Tensor) -> Tensor:
        sd = self.sd
        mean, var = sd[f"{key}.running_mean"].clone(), sd[f"{key}.running_var"].clone()
        return F.batch_norm(x, mean, var, sd[f"{key}.weight"], sd[f"{key}.bias"], self.training, 0.1, 1e-5)

    def block(self, key: str, x: Tensor, groups: int = 1, stride: int = 1) -> Tensor:
        sd = self.sd
        dense, small = sd[f"{key}.rbr_dense.conv.weight"], f"{key}.rbr_1x1" + (".1" if stride == 2 else "")
        y = self.norm(f"{key}.rbr_dense.bn", F.conv2d(x, dense, None, stride, 1, 1, groups))
        pooled = x if stride == 1 else F.avg_pool2d(x, 2, 2)
        y = y + self.norm(f"{small}.bn", F.conv2d(pooled, sd[f"{small}.conv.weight"], groups=groups))
        fc = sd[f"{key}.se.cvsig.conv.weight"]
        if f"{key}.rbr_identity.weight" in sd:
            u = self.norm(f"{key}.rbr_identity", x)
            y = y + u * torch.sigmoid(F.conv2d(u.mean((2, 3), keepdim=True), fc))
        else:
            y = y * 2 * torch.sigmoid(F.conv2d(x.mean((2, 3), keepdim=True), fc, groups=groups))
        y = F.silu(y)
        return y if groups == 1 else y.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    def fusion(self, key: str, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack((self.norm(f"{key}.b1", x), self.norm(f"{key}.b2", y)), 2).flatten(1, 2)

    def network(self, x: Tensor, layers: tuple[int, ...]) -> Tensor:
        maps = []
        for i, count in enumerate(layers):
            for key in ("inits.0.0.block", "inits.0.1.block") if i == 0 else (f"inits.{i}.block",):
                x = self.block(key, x, stride=2)
            y = x
            for j in range(count):
                y = self.block(f"streams.{i}.{j}.block", y)
            maps.append(y)
        y = self.block("downsamples_2.0.block", maps[0], stride=2)
        y = self.block("downsamples_2.1.2.block", self.fusion("downsamples_2.1.0", maps[1], y), 2, 2)
        y = self.block("combine.2.block", self.fusion("combine.0", maps[2], y), 2)
        y = self.block("combine.3.block", y, stride=2)
        return F.linear(y.mean((2, 3)), self.sd["head.fc.weight"], self.sd["head.fc.bias"])


def _small() -> ParNet:
    return ParNet((8, 12, 16, 20), (1, 2, 1), num_classes=5)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model: Any = create(name)
        trained = sum(p.numel() for p in model.parameters())
        deployed = sum(p.numel() for p in model.fuse().parameters())
    assert (trained, deployed) == COUNTS[name]


@pytest.mark.parametrize("training", [False, True])
def test_network_is_its_formula(training: bool) -> None:
    model = randomised(_small).double().train(training)
    names = [name for name, _ in model.named_parameters()]
    sd = {key: t.clone().requires_grad_(key in names) for key, t in model.state_dict().items()}
    image = torch.randn(2, 3, 64, 32, dtype=torch.float64, requires_grad=True)
    expected = Formula(sd, training).network(image, (1, 2, 1))
    y = model(image)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, [image, *model.parameters()], grad)
    others = torch.autograd.grad(expected, [image, *(sd[name] for name in names)], grad)
    for name, g, other in zip(["image", *names], grads, others, strict=True):
        torch.testing.assert_close(g, other, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    if not training:
        with torch.inference_mode():
            torch.testing.assert_close(model(image), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (37, 50)])
def test_fused_is_evaluation(height: int, width: int) -> None:
    """Also where sizes are odd."""
    model = randomised(_small).double().eval()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        got = model.fuse()(x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert not [key for key in model.state_dict() if "rbr_1x1" in key or "rbr_dense.conv" in key]
    assert {"inits.0.0.block.rbr_dense.weight", "combine.3.block.rbr_dense.bias"} <= model.state_dict().keys()
    assert model.fuse() is model
    again = _small().double().fuse().eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), expected)


def test_multiply_accumulates() -> None:
    with torch.device("meta"), convblocks.use_backend("reference"):
        model: Any = create("parnet_s").eval()
        with FlopCounterMode(display=False) as counter:
            model.fuse()(torch.empty(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e9, 2) == 4.73


@pytest.mark.parametrize("attention", ["se", "eca", "scse", None])
@pytest.mark.parametrize(("c", "out", "stride", "groups"), [(8, 8, 1, 1), (8, 12, 1, 2), (8, 8, 2, 1), (8, 12, 2, 2)])
def test_block_fuses(c: int, out: int, stride: int, groups: int, attention: str | None) -> None:
    block = randomised(lambda: ParNetBlock(c, out, stride, groups, attention=attention)).double().eval()
    x = torch.randn(2, c, 7, 6, dtype=torch.float64)
    y = block(x)
    assert list(y.shape) == [2, out, -(-7 // stride), 6 // stride]
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    torch.testing.assert_close(block.fuse()(x), y, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(block(x), y, rtol=1e-10, atol=1e-10)


def test_block_without_attention_or_with_another() -> None:
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    formula = {"training": False}
    for skips, out in ((True, 8), (False, 12)):
        block = randomised(lambda o=out: ParNetBlock(8, o, attention="eca", activation="relu")).double().eval()
        f = Formula({f"b.{key}": t for key, t in block.state_dict().items()}, **formula)
        y = f.norm("b.rbr_dense.bn", block.rbr_dense.conv(x)) + f.norm("b.rbr_1x1.bn", block.rbr_1x1.conv(x))
        y = y + block.se(f.norm("b.rbr_identity", x)) if skips else block.se(y)
        torch.testing.assert_close(block(x), y.relu())


def test_without_norm_is_parnet_attention() -> None:
    """The form of External-Attention: keys, parameters, and what it computes."""
    theirs: Any = nn.Module()
    theirs.sse = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 24, 1), nn.Sigmoid())
    theirs.conv1x1 = nn.Sequential(nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24))
    theirs.conv3x3 = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24))
    theirs = randomised(lambda: theirs).double()
    block = ParNetBlock(24, sse_bn=False).double()
    for source in ("official", None):
        block.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), source, block), strict=True)
    x = torch.randn(3, 24, 5, 6, dtype=torch.float64)
    for train in (True, False):
        block.train(train), theirs.train(train)
        expected = F.silu(theirs.conv1x1(x) + theirs.conv3x3(x) + theirs.sse(x) * x)
        torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.fuse()(x), expected)
    with torch.device("meta"):
        assert sum(p.numel() for p in ParNetBlock(512, sse_bn=False).parameters()) == 2_887_168


def test_fusion() -> None:
    fusion = randomised(lambda: ParNetFusion(4)).eval()
    x, y = torch.randn(2, 3, 4, 5, 6)
    expected = Formula({f"f.{key}": t for key, t in fusion.state_dict().items()}, False).fusion("f", x, y)
    torch.testing.assert_close(fusion((x, y)), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast(fused: bool) -> None:
    model = randomised(_small).eval()
    model = model.fuse() if fused else model
    x = torch.randn(2, 3, 32, 32)
    block = model.streams[0][0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(x)).all()
        assert torch.isfinite(block(torch.randn(2, 8, 6, 6))).all()


def test_options() -> None:
    assert [create(f"parnet_{size}", widths=(8, 12, 16, 20)).drop.p for size in ("s", "l")] == [0.0, 0.1]
    model = create("parnet_s", widths=(8, 12, 16, 20), features_only=True, attention="simam")
    assert [list(m.shape[1:]) for m in model(torch.randn(2, 3, 64, 64))] == [
        [8, 16, 16],
        [12, 8, 8],
        [16, 4, 4],
        [20, 2, 2],
    ]
    assert not [key for key in model.state_dict() if key.startswith("head") or ".se." in key]


def test_refuses() -> None:
    for make, message in (
        (lambda: ParNetBlock(8, stride=3), "ParNetBlock: expected a stride of 1 or 2, got 3"),
        (lambda: ParNetBlock(8, 12, groups=5), "ParNetBlock: expected groups that divide 8 and 12 channels, got 5"),
        (lambda: ParNetBlock(8, 12, sse_bn=False), "ParNetBlock: expected sse_bn where channels or size change, got F"),
        (lambda: ParNetBlock(8, attention="sea"), "ParNetBlock: expected attention to be one of se, "),
        (lambda: ParNetBlock(8, activation="tanh"), "ParNetBlock: expected activation to be one of "),
        (lambda: ParNetFusion(0), "ParNetFusion: expected channels to be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
