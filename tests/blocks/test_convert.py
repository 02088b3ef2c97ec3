"""State dicts of other layouts, of blocks and of networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import convblocks
from convblocks import convert_state_dict
from tests.accelerate.sources import timm, torchvision

C, R = 24, 6


def _shapes(*names: str, linear: bool = False) -> dict[str, torch.Tensor]:
    one = () if linear else (1, 1)
    first, second = names
    return {
        f"{first}.weight": torch.randn(R, C, *one),
        f"{first}.bias": torch.randn(R),
        f"{second}.weight": torch.randn(C, R, *one),
        f"{second}.bias": torch.randn(C),
    }


@pytest.mark.parametrize(
    ("source", "names", "linear"),
    [
        ("convblocks", ("fc1", "fc2"), False),
        ("torchvision", ("fc1", "fc2"), False),
        ("timm", ("conv_reduce", "conv_expand"), False),
        ("official", ("fc.0", "fc.2"), True),
        ("pytorchcv", ("conv1", "conv2"), False),
        ("pytorchcv", ("fc1", "fc2"), True),
        ("efficientnet_pytorch", ("_se_reduce", "_se_expand"), False),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_squeeze_excite(source: str, names: tuple[str, str], linear: bool, wrapper: str) -> None:
    given = _shapes(*names, linear=linear)
    sd = {wrapper + k: v for k, v in given.items()}
    block = convblocks.SqueezeExcite(C, R)
    for converted in (
        convert_state_dict(sd),
        convert_state_dict(sd, source=source),
        convert_state_dict(sd, model=block),
    ):
        block.load_state_dict(converted, strict=True)
        for a, b in zip(block.state_dict().values(), given.values(), strict=True):
            assert torch.equal(a.flatten(), b.flatten())
    assert list(sd) == [wrapper + k for k in given]


@pytest.mark.parametrize(
    ("source", "names", "linear"),
    [
        ("convblocks", ("cSE.fc1", "cSE.fc2", "sSE.conv"), False),
        ("segmentation_models_pytorch", ("cSE.1", "cSE.3", "sSE.0"), False),
        ("official", ("cSE.fc1", "cSE.fc2", "sSE.conv"), True),
        ("official", ("cSE.Conv_Squeeze", "cSE.Conv_Excitation", "sSE.conv"), False),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.decoder.blocks.0.attention1.attention."])
def test_scse(source: str, names: tuple[str, str, str], linear: bool, prefix: str) -> None:
    block = convblocks.SCSE(C, C // R)
    given = _shapes(*names[:2], linear=linear)
    given |= {f"{names[2]}.weight": torch.randn(1, C, 1, 1), f"{names[2]}.bias": torch.randn(1)}
    sd = {prefix + k: v for k, v in given.items()}
    for converted in (convert_state_dict(sd), convert_state_dict(sd, source=source)):
        start = prefix.removeprefix("module.")
        assert all(k.startswith(start) for k in converted)
        block.load_state_dict({k.removeprefix(start): v for k, v in converted.items()}, strict=True)
        for a, b in zip(block.state_dict().values(), given.values(), strict=True):
            assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("convblocks", ("conv_dw", "bn1", "conv_pw", "bn2")),
        ("timm", ("conv1", None, "pointwise", None)),
        ("timm", ("conv_dw", "bn_dw", "conv_pw", "bn_pw")),
        ("segmentation_models_pytorch", ("0", None, "1", None)),
        ("official", ("conv", None, "pointwise", None)),
        ("official", ("depthwise_conv", None, "pointwise_conv", None)),
        ("official", ("depth_conv.0", "depth_conv.1", "point_conv.0", "point_conv.1")),
        ("pytorchcv", ("dw_conv", None, "pw_conv", None)),
        ("pytorchcv", ("dw_conv.conv", "dw_conv.bn", "pw_conv.conv", "pw_conv.bn")),
    ],
)
def test_depthwise_separable(source: str, names: tuple[str | None, ...]) -> None:
    norms = names[1] is not None
    block = convblocks.DepthwiseSeparableConv(C, 2 * C, dw_norm=norms, pw_norm=norms)
    given = dict(zip(("conv_dw", "bn1", "conv_pw", "bn2"), names, strict=True))
    for prefix in ("", "blocks.3.conv."):
        sd = {}
        for key, value in block.state_dict().items():
            layer, _, name = key.partition(".")
            sd[f"{prefix}{given[layer]}.{name}"] = torch.randn_like(value) if value.is_floating_point() else value + 7
        for converted in (convert_state_dict(sd), convert_state_dict(sd, source=source)):
            ours = {k.removeprefix(prefix): v for k, v in converted.items()}
            block.load_state_dict(ours, strict=True)
            for a, b in zip(block.state_dict().values(), sd.values(), strict=True):
                assert torch.equal(a, b)


def test_one_layer_and_eca() -> None:
    ese = convblocks.EffectiveSqueezeExcite(C)
    sd = timm.models.hgnet.EseModule(C).state_dict()
    ese.load_state_dict(convert_state_dict(sd), strict=True)
    assert torch.equal(ese.fc.weight, sd["conv.weight"])
    eca = {"conv.weight": torch.randn(1, 1, 3)}
    assert convert_state_dict(eca).keys() == eca.keys()
    host = convert_state_dict({"layer1.0.eca.conv.weight": eca["conv.weight"], "fc.weight": torch.randn(5, 8)})
    assert set(host) == {"layer1.0.se.conv.weight", "fc.weight"}


def test_hosts_in_networks() -> None:
    def keys(*names: str, linear: bool = False) -> set[str]:
        rest = {"fc.weight": torch.randn(10, C), "bn1.num_batches_tracked": torch.tensor(3)}
        return set(convert_state_dict({**_shapes(*names, linear=linear), **rest})) - set(rest)

    at = {f"layer1.0.se.{p}" for p in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    assert keys("layer1.0.se_module.fc1", "layer1.0.se_module.fc2") == at
    assert keys("layer1.0.se.conv_reduce", "layer1.0.se.conv_expand") == at
    assert keys("layer1.0.se.fc.0", "layer1.0.se.fc.2", linear=True) == at
    assert keys("layer1.0.se.conv1", "layer1.0.se.conv2") == at
    assert keys("layer1.0._se_reduce", "layer1.0._se_expand") == at
    # the same names where nothing is squeezed
    assert keys("layer1.0.conv1", "layer1.0.conv2") == set(_shapes("layer1.0.conv1", "layer1.0.conv2"))
    head = {"fc.0.weight": torch.randn(R, C), "fc.2.weight": torch.randn(10, R), "conv.weight": torch.randn(C, C, 1, 1)}
    assert convert_state_dict(head).keys() == head.keys()


@pytest.mark.parametrize("name", ["efficientnet_b0", "hgnetv2_b0", "legacy_seresnet18", "seresnet18", "ecaresnet26t"])
def test_networks_of_timm(name: str) -> None:
    """Every squeeze-excite of a network is found, and nothing else is touched."""
    sd = timm.create_model(name).state_dict()
    converted = convert_state_dict(sd)
    assert len(converted) == len(sd)
    for (old, a), (new, b) in zip(sd.items(), converted.items(), strict=True):
        assert torch.equal(a, b)
        host = any(part in old for part in (".conv_reduce.", ".conv_expand.", ".se_module.", ".att.conv."))
        assert (old != new) == host, (old, new)
        assert new.endswith((".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked", ".scale"))


def test_torchvision_network_is_native() -> None:
    sd = torchvision.models.mobilenet_v3_small().state_dict()
    assert list(convert_state_dict(sd)) == list(sd)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convert_state_dict({}, source="keras"), ValueError, "source to be one of convblocks, .*, got keras"),
        (lambda: convert_state_dict(3), TypeError, "expected a mapping from names to tensors, got int"),
        (lambda: convert_state_dict({"state_dict": {}}), TypeError, "got a mapping at 'state_dict'"),
        (
            lambda: convert_state_dict(_shapes("fc.0", "fc.2", linear=True), model=convblocks.SqueezeExcite(C, 4)),
            ValueError,
            r"expected the state dict of a SqueezeExcite, got fc1.bias of size \[6\] instead of \[4\]",
        ),
        (
            lambda: convert_state_dict(_shapes("a", "b"), model=convblocks.SqueezeExcite(C, R)),
            ValueError,
            "expected the state dict of a SqueezeExcite, got an unknown a.bias, an unknown a.weight, .* and 3 more",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_keys_that_fit_several_layouts() -> None:
    both = {**_shapes("0.se.conv1", "0.se.conv2"), **_shapes("1.se.conv_reduce", "1.se.conv_expand")}
    with pytest.raises(ValueError, match="got keys that fit several: give source or model"):
        convert_state_dict(both)
    assert "0.se.fc1.weight" in convert_state_dict(both, source="pytorchcv")


def test_num_batches_tracked_may_be_missing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    sd = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
    model.load_state_dict(convert_state_dict(sd, model=model), strict=True)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this file's code ran",)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_files_of_torch(wrapper: str | None, tmp_path: Path) -> None:
    theirs = timm.layers.SEModule(64)
    sd = theirs.state_dict()
    torch.save(sd if wrapper is None else {wrapper: sd, "epoch": 3, "optimizer": {}}, tmp_path / "weights.pth")
    ours = convblocks.SqueezeExcite(64, rd_channels=theirs.fc1.out_channels)
    ours.load_state_dict(convert_state_dict(tmp_path / "weights.pth", model=ours))
    assert torch.equal(ours.fc1.weight, theirs.fc1.weight)


def test_files_of_safetensors(tmp_path: Path) -> None:
    theirs = timm.create_model("resnet18", num_classes=7)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = convblocks.models.resnet18(num_classes=7)
    ours.load_state_dict(convert_state_dict(str(tmp_path / "model.safetensors"), model=ours))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_files_that_hold_more_than_tensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc1.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="convert_state_dict: expected a file of tensors only"):
        convert_state_dict(tmp_path / "weights.pth")
    assert "code ran" not in capfd.readouterr().out
    torch.save(torch.ones(3), tmp_path / "weights.pth")
    with pytest.raises(TypeError, match=r"expected a state dict in .*weights\.pth, got Tensor"):
        convert_state_dict(tmp_path / "weights.pth")
    for junk in ("no weights", "junk"):
        (tmp_path / "weights.pth").write_text(junk)
        with pytest.raises(ValueError, match="convert_state_dict: expected a file of tensors only"):
            convert_state_dict(tmp_path / "weights.pth")
    (tmp_path / "model.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="convert_state_dict: expected a file of safetensors, got"):
        convert_state_dict(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        convert_state_dict(tmp_path / "none.pth")
