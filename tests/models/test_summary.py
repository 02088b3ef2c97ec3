"""What ``python -m convblocks models`` and ``describe`` say."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

from convblocks.__main__ import main
from convblocks.models.summary import EPILOGUE, macs, meta, parts, traffic


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_multiply_accumulates_are_torchs_count(name: str) -> None:
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)().eval()
        with counter:
            theirs(torch.empty(1, 3, 224, 224))
    assert macs(meta(name), 224) == counter.get_total_flops() // 2


def test_published_multiply_accumulates() -> None:
    """In units of 10^9, of models/blocks as published or counted elsewhere."""
    for name, size, expected in (
        ("resnet50", 224, 4.089),
        ("se_resnet50", 224, 4.092),
        ("cbam_resnet50", 224, 4.096),
        ("unet", 256, 48.172),
    ):
        assert macs(meta(name), size) / 1e9 == pytest.approx(expected, abs=5e-4)


def test_traffic_of_known_layers() -> None:
    """The first layers of a ResNet, by hand."""
    image, half, quarter = 3 * 64 * 64, 64 * 32 * 32, 64 * 16 * 16
    stem = meta("resnet18", features_only=True)
    stem.trunk = lambda: [[stem.conv1, stem.bn1], [stem.maxpool]]
    moved = traffic(stem, 64)
    eager, ours = moved["eager"], moved["ours"]
    weights = 64 * 3 * 49
    assert eager["k x k convolution"] == ours["k x k convolution"] == 4 * (image + weights + half)
    assert eager["pooling"] == 4 * (half + quarter + 2 * quarter)  # and the indices, of 8 bytes
    assert eager[EPILOGUE] == 4 * (4 * half + 6 * 64)  # norm with four vectors in and two out, then ReLU
    assert ours[EPILOGUE] == 4 * (2 * half + 13 * 64)  # the pass, and what makes its factors and offsets


def test_parts_are_all_of_it() -> None:
    model = meta("resnet18", attention="eca")
    found = parts(model, 224)
    assert sum(part.parameters * part.count for part in found) == sum(p.numel() for p in model.parameters())
    assert [part.size for part in found if part.kind == "BasicBlock"][-1] == (512, 7, 7)
    assert sum(part.count for part in found if part.kind == "BasicBlock") == 8


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "wide_resnet50"]) == 0
    out = capsys.readouterr().out
    for word in ("wide_resnet50_2", "68,883,240", "11.398", "torchvision", "official"):
        assert word in out
    assert "resnet18" not in out
    assert main(["models", "resnet5x"]) == 2
    assert "is it resnet50" in capsys.readouterr().err


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "resnet50", "--attention", "eca", "--size", "128"]) == 0
    out = capsys.readouterr().out
    for word in ("layer2.1", "Bottleneck  x 3", "512 x 16 x 16", "25,557,118 parameters", "attention", "eager", "ours"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet5"], "describe: expected the name of a network, got 'resnet5': is it resnet50"),
        (["unet", "--size", "8"], "describe: unet: expected images of at least 16 x 16 pixels, got 8 x 8"),
        (["resnet18", "--attention", "sea"], "expected attention to be one of se"),
    ],
)
def test_describe_refuses(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", *arguments]) == 2
    assert words in capsys.readouterr().err
