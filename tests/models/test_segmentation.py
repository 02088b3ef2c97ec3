"""DeepLabv3 and U-Nets against torchvision's, segmentation_models_pytorch's and the papers."""

from __future__ import annotations

from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from torch import Tensor, nn

import convblocks
from convblocks.blocks.unet import centre_crop
from convblocks.models import create
from tests.models.common import assert_same, parameters, randomised

PAPER: dict[str, Any] = {"padding": "valid", "norm": False, "skip": "crop"}


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("deeplabv3_resnet50", {}, 39_638_869),
        ("deeplabv3_resnet50", {"aux": True}, 42_004_074),
        ("deeplabv3_resnet101", {}, 58_630_997),
        ("deeplabv3_resnet101", {"aux": True}, 60_996_202),
        ("unet", {}, 31_037_698),
        ("unet", {"up": "bilinear"}, 17_263_042),
        ("unet", {"num_classes": 1, "in_channels": 1}, 31_036_481),
        ("unet", {"in_channels": 1, **PAPER}, 31_030_658),
        ("scse_unet", {}, 24_550_360),
        ("scse_unet", {"attention": None}, 24_436_369),
        ("scse_unet", {"encoder": "resnet50"}, 33_816_076),
    ],
)
def test_parameters(name: str, options: dict[str, Any], count: int) -> None:
    assert parameters(name, **options) == count


def test_aspp_is_torchvisions() -> None:
    for rates in ((6, 12, 18), (4,)):
        theirs = randomised(lambda r=rates: torchvision.models.segmentation.deeplabv3.ASPP(16, r, 24)).double()
        ours = convblocks.ASPP(16, rates, 24, dropout=0.0).double()
        theirs.project[3].p = 0.0
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
        with torch.no_grad():  # the pooled branch as a bias
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    with torch.device("meta"):
        assert sum(p.numel() for p in convblocks.ASPP(256, (6, 12, 18)).parameters()) == 2_231_296
        assert sum(p.numel() for p in convblocks.ASPP(2048).parameters()) == 15_535_104
    with pytest.raises(ValueError, match="ASPP: expected each of atrous_rates to be a positive integer, got 0"):
        convblocks.ASPP(8, (0,))


def test_separable_aspp_is_smps() -> None:
    make = smp.decoders.deeplabv3.decoder.ASPP
    theirs = randomised(lambda: make(16, 24, (2, 6, 12), separable=True, dropout=0.0)).double()
    ours = convblocks.ASPP(16, (2, 6, 12), 24, separable=True, dropout=0.0).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 16, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_deeplab_is_torchvisions() -> None:
    theirs = randomised(
        lambda: torchvision.models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=4, aux_loss=True
        )
    )
    ours = create("deeplabv3_resnet50", num_classes=4, aux=True)
    for model in (ours, theirs):
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0

    def output(y: Any) -> Tensor:
        return torch.cat(list(y.values()), 1) if isinstance(y, dict) and "aux" in y else y

    x = torch.randn(2, 3, 33, 33)
    assert_same(ours, theirs, "torchvision", x, lambda y: y["out"] if isinstance(y, dict) else y)
    ours, theirs = ours.double().train(), theirs.double().train()
    got, expected = ours(x.double()), theirs(x.double())
    assert got.keys() == expected.keys()
    torch.testing.assert_close(output(got), output(expected))


def test_scse_unet_is_smps() -> None:
    for scse in ("scse", None):
        theirs = randomised(
            lambda a=scse: smp.Unet("resnet18", encoder_weights=None, classes=3, decoder_attention_type=a)
        )
        ours = create("scse_unet", encoder="resnet18", num_classes=3, attention=scse)
        assert_same(ours, theirs, "segmentation_models_pytorch", torch.randn(2, 3, 64, 32))


class _DoubleConv(nn.Module):
    def __init__(self, c: int, out: int, mid: int) -> None:
        super().__init__()
        layers = []
        for i, o in ((c, mid), (mid, out)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class _Reference(nn.Module):
    """A U-Net of depth 2 as milesial's is, layer by layer."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.bilinear, factor = bilinear, 2 if bilinear else 1
        self.inc = _DoubleConv(3, 8, 8)
        self.down1, self.down2 = nn.Module(), nn.Module()
        self.down1.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(8, 16, 16))
        self.down2.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(16, 32 // factor, 32 // factor))
        self.up1, self.up2 = nn.Module(), nn.Module()
        for up, c, out in ((self.up1, 32, 16 // factor), (self.up2, 16, 8)):
            if bilinear:
                up.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                up.conv = _DoubleConv(c, out, c // 2)
            else:
                up.up = nn.ConvTranspose2d(c, c // 2, 2, 2)
                up.conv = _DoubleConv(c, out, out)
        self.outc = nn.Module()
        self.outc.conv = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.inc(x)
        b = self.down1.maxpool_conv(a)
        y = self.down2.maxpool_conv(b)
        for up, skip in ((self.up1, b), (self.up2, a)):
            y = up.up(y)
            h, w = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
            y = nn.functional.pad(y, [w // 2, w - w // 2, h // 2, h - h // 2])
            y = up.conv(torch.cat([skip, y], 1))
        return self.outc.conv(y)


@pytest.mark.parametrize("up", ["transpose", "bilinear"])
def test_unet_is_milesials(up: str) -> None:
    theirs = randomised(lambda: _Reference(up == "bilinear"))
    assert_same(create("unet", base=8, depth=2, up=up), theirs, "official", torch.randn(2, 3, 22, 19))
    ours, masks = create("unet", base=8, depth=2, up=up), {"mask_values": [0, 255]}
    wrapped = {f"module.{k}": v for k, v in theirs.state_dict().items()}
    for checkpoint in (theirs.state_dict() | masks, wrapped | masks, wrapped | {"module.mask_values": [0, 255]}):
        ours.load_state_dict(convblocks.convert_state_dict(checkpoint, model=ours))
        ours.load_state_dict(convblocks.convert_state_dict(checkpoint))


def test_the_papers_unet() -> None:
    with torch.device("meta"):
        model = create("unet", **PAPER)
        assert model(torch.empty(1, 3, 572, 572)).shape == (1, 2, 388, 388)
        assert model.least_size == 188
        assert model(torch.empty(1, 3, 188, 204)).shape == (1, 2, 4, 20)
        with pytest.raises(ValueError, match="stay even when halved, such as 588, got 573"):
            model(torch.empty(1, 3, 572, 573))
        with pytest.raises(ValueError, match="at least 188 x 188 pixels, got 187 x 572"):
            model(torch.empty(1, 3, 187, 572))
    assert create("unet", base=4, **PAPER).feature_info() == [(4 << i, 1 << i) for i in range(5)]
    x = torch.arange(49.0).view(1, 1, 7, 7)
    assert torch.equal(centre_crop(x, 4, 3), x[:, :, 1:5, 2:5])
    small = create("unet", base=4, depth=1, up="nearest", skip_first=False, **PAPER)
    assert small(torch.randn(1, 3, 20, 24)).shape == (1, 2, 4, 8)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="UNetUp: expected up to be one of transpose, bilinear, nearest, got cubic"):
        create("unet", up="cubic")
    with pytest.raises(ValueError, match="DoubleConv: expected padding to be one of same, valid, got full"):
        create("unet", padding="full")
    with pytest.raises(ValueError, match=r"UNetUp: expected a map to crop of at least \[8, 8\], got \[6, 8\]"):
        convblocks.UNetUp(4, 4, 4, skip="crop")(torch.randn(1, 4, 4, 4), torch.randn(1, 4, 6, 8))
    with pytest.raises(ValueError, match="DeepLabV3: expected an output_stride of 8 or 16, got 32"):
        create("deeplabv3_resnet50", output_stride=32)
    with pytest.raises(ValueError, match=r"DeepLabV3: expected backbone to be one of resnet18, .*, got unet"):
        create("deeplabv3_resnet50", backbone="unet")
    with pytest.raises(ValueError, match="EncoderUNet: expected encoder to be the name of a classification network"):
        create("scse_unet", encoder="unet")
    with pytest.raises(ValueError, match=r"an encoder with a map of each of 2 halvings of the image, got resnet18"):
        create("scse_unet", encoder="resnet18", decoder_channels=(8, 4))
