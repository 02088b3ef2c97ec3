"""The blocks against timm's and torchvision's own, and as parts of their networks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import convblocks
from convblocks.ops.simam import reference as simam_reference
from tests.accelerate.sources import (
    CHANNELS,
    CecaModule,
    EcaModule,
    EffectiveSEModule,
    GlobalContext,
    SEModule,
    SqueezeExcitation,
    complaint,
    made,
    timm,
)

Make = Callable[[], nn.Module]
PAIRS: dict[str, tuple[Make, Make]] = {}


def _pair(name: str, ours: type[nn.Module], theirs: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> None:
    PAIRS[name] = partial(ours, *args, **kwargs), partial(theirs, *args, **kwargs)


_pair("se", convblocks.SqueezeExcite, SEModule, CHANNELS)
_pair("se-rd", convblocks.SqueezeExcite, SEModule, CHANNELS, rd_ratio=0.5, rd_divisor=4, bias=False)
_pair("se-width", convblocks.SqueezeExcite, SEModule, CHANNELS, rd_channels=5, add_maxpool=True)
_pair("se-norm", convblocks.SqueezeExcite, SEModule, CHANNELS, norm_layer=nn.BatchNorm2d)
_pair("se-acts", convblocks.SqueezeExcite, SEModule, CHANNELS, act_layer=nn.SiLU, gate_layer="hard_sigmoid")
_pair("se-tv", convblocks.SqueezeExcite, SqueezeExcitation, CHANNELS, 6)
_pair(
    "se-tv-acts",
    convblocks.SqueezeExcite,
    SqueezeExcitation,
    input_channels=CHANNELS,
    squeeze_channels=6,
    activation=partial(nn.SiLU, inplace=True),
    scale_activation=nn.Hardsigmoid,
)
_pair("ese", convblocks.EffectiveSqueezeExcite, EffectiveSEModule, CHANNELS)
_pair("ese-opt", convblocks.EffectiveSqueezeExcite, EffectiveSEModule, CHANNELS, add_maxpool=True, gate_layer="sigmoid")
_pair("eca", convblocks.ECA, EcaModule, CHANNELS)
_pair("eca-none", convblocks.ECA, EcaModule)
_pair("eca-512", convblocks.ECA, EcaModule, 512, gamma=1, beta=2)
_pair("eca-k7", convblocks.ECA, EcaModule, kernel_size=7, gate_layer="hard_sigmoid")
_pair("gc", convblocks.GlobalContext, GlobalContext, CHANNELS, use_attn=False, act_layer=nn.SiLU)
_pair("gc-both", convblocks.GlobalContext, GlobalContext, CHANNELS, fuse_add=True, use_attn=False, rd_ratio=0.25)
PAIRS["ceca"] = partial(convblocks.ECA, CHANNELS, padding_mode="circular"), partial(CecaModule, CHANNELS)
PAIRS["ceca-bias"] = (
    partial(convblocks.ECA, kernel_size=5, padding_mode="circular", bias=True),
    partial(CecaModule, kernel_size=5, act_layer=nn.ReLU),
)
each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS.keys())


def _run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad), *module.buffers()]


@each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_same_as_theirs(
    ours: Make, theirs: Make, dtype: torch.dtype, memory_format: torch.memory_format, backend: str, device: str
) -> None:
    module, block = made(theirs).to(device, dtype), ours().to(device, dtype)
    block.load_state_dict(module.state_dict(), strict=True)
    theirs().to(device, dtype).load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(3, CHANNELS, 7, 9).to(device, dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    for train in (True, False):
        module.train(train)
        block.train(train)
        exact = _run(copy.deepcopy(module).double(), x.double(), grad.double())
        before, after = _run(module, x, grad), _run(block, x, grad)
        assert after[0].stride() == x.stride()
        for a, b, c in zip(after, before, exact, strict=True):
            assert a.dtype == b.dtype
            assert complaint(a, b, c) is None if a.is_floating_point() else torch.equal(a, b)


@each_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_autocast_dtype(ours: Make, theirs: Make, dtype: torch.dtype, backend: str, device: str) -> None:
    block, module, x = ours().to(device), theirs().to(device), torch.randn(2, CHANNELS, 5, 5).to(device, dtype)
    with torch.autocast(device, torch.bfloat16):
        assert block(x).dtype == module(x).dtype


def test_simam(backend: str, device: str) -> None:
    x = torch.randn(2, 8, 5, 5, device=device)
    torch.testing.assert_close(convblocks.SimAM(8, e_lambda=0.1)(x), simam_reference(x, 0.1))
    assert not convblocks.SimAM().state_dict()


@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_channel_shuffle_and_its_inverse(groups: int, backend: str, device: str) -> None:
    x = torch.randn(2, 12, 5, 5, device=device)
    y = convblocks.ChannelShuffle(groups)(x)
    torch.testing.assert_close(y, nn.ChannelShuffle(groups)(x), rtol=0, atol=0)
    torch.testing.assert_close(convblocks.ChannelShuffle(groups, inverse=True)(y), x, rtol=0, atol=0)
    with pytest.raises(ValueError, match="channel_shuffle: expected groups that divide the 12 channels, got 5"):
        convblocks.ChannelShuffle(5, inverse=True)(x)


ALL = {
    "SqueezeExcite": convblocks.SqueezeExcite,
    "EffectiveSqueezeExcite": convblocks.EffectiveSqueezeExcite,
    "ECA": convblocks.ECA,
    "GlobalContext": convblocks.GlobalContext,
    "SimAM": convblocks.SimAM,
}
each_block = pytest.mark.parametrize("block", ALL.values(), ids=ALL.keys())


def _count(model: nn.Module, block: type[nn.Module]) -> int:
    return sum(type(m) is block for m in model.modules())


@each_block
def test_in_networks_of_timm(block: Any) -> None:
    create = timm.create_model
    assert _count(create("resnet18", block_args={"attn_layer": block}), block) == 8
    assert _count(create("efficientnet_b0", se_layer=block), block) == 16
    model = create("seresnet33ts", attn_layer=block).eval()
    assert _count(model, block) == 10
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@each_block
def test_in_networks_of_torchvision(block: Any) -> None:
    from torchvision.models import efficientnet, mobilenetv3

    configuration, last = efficientnet._efficientnet_conf("efficientnet_b0", width_mult=0.5, depth_mult=0.3)
    for c in configuration:
        c.block = partial(efficientnet.MBConv, se_layer=block)
    model = efficientnet.EfficientNet(configuration, dropout=0.0, last_channel=last).eval()
    assert _count(model, block) == sum(c.num_layers for c in configuration)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    c = mobilenetv3.InvertedResidualConfig(16, 3, 64, 16, True, "HS", 1, 1, 1)
    residual = mobilenetv3.InvertedResidual(c, nn.BatchNorm2d, se_layer=block)
    assert _count(residual, block) == 1
    assert residual(torch.randn(1, 16, 8, 8)).shape == (1, 16, 8, 8)


def test_weights_of_whole_networks_fit() -> None:
    """Built with our blocks, their networks have the keys, the sizes and the outputs that they have with theirs."""
    layer = partial(convblocks.SqueezeExcite, rd_divisor=1)
    x = torch.randn(2, 3, 64, 64)
    for theirs, ours in (
        (
            timm.create_model("seresnet18"),
            timm.create_model("resnet18", block_args={"attn_layer": ALL["SqueezeExcite"]}),
        ),
        (timm.create_model("efficientnet_b0"), timm.create_model("efficientnet_b0", se_layer=layer)),
    ):
        for m in theirs.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
        ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), model=ours), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-4)


def test_widths() -> None:
    """The hidden widths that timm's rule gives (C to R), and the taps of ECA (C to k)."""
    widths = {16: 8, 112: 8, 160: 8, 192: 16, 256: 16, 2048: 128}
    assert {c: convblocks.SqueezeExcite(c).fc1.out_channels for c in widths} == widths
    taps = {8: 3, 16: 3, 112: 3, 128: 5, 1536: 5, 2048: 7}
    assert {c: convblocks.ECA(c).conv.kernel_size[0] for c in taps} == taps
    assert convblocks.ECA(2048, kernel_size=3).conv.kernel_size == (3,)
    assert convblocks.SqueezeExcite(10, rd_ratio=0.25, rd_round_fn=round).fc1.out_channels == 2


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("ReLU", "relu"),
        ("swish", "silu"),
        ("hard_swish", "hardswish"),
        (nn.ReLU6, "relu6"),
        (nn.GELU, "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (partial(nn.LeakyReLU, inplace=True), "leaky_relu"),
        (timm.layers.get_act_layer("gelu_tanh"), "gelu_tanh"),
        (timm.layers.activations.Swish, "silu"),
    ],
)
def test_names_of_activations(layer: Any, name: str) -> None:
    assert convblocks.SqueezeExcite(8, act_layer=layer).activation_name == name
    assert convblocks.SqueezeExcite(8, activation=layer).activation_name == name
    assert convblocks.SqueezeExcite(8, act_layer="relu", force_act_layer=layer).activation_name == name


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            partial(ALL["SqueezeExcite"]),
            ValueError,
            "SqueezeExcite: expected channels to be a positive integer, got None",
        ),
        (partial(ALL["SqueezeExcite"], 0), ValueError, "expected channels to be a positive integer, got 0"),
        (partial(ALL["SqueezeExcite"], 8, 0.25), ValueError, "squeeze_channels to be a positive integer, got 0.25"),
        (partial(ALL["SqueezeExcite"], 8, act_layer="mish"), ValueError, "act_layer to be one of relu, .*, got mish"),
        (partial(ALL["SqueezeExcite"], 8, act_layer=nn.Mish), ValueError, r"act_layer to be one of .*, got Mish\(\)"),
        (
            partial(ALL["SqueezeExcite"], 8, act_layer=nn.LeakyReLU(0.2)),
            ValueError,
            r"got LeakyReLU\(negative_slope=0.2",
        ),
        (partial(ALL["SqueezeExcite"], 8, gate_layer=nn.ReLU), ValueError, r"gate_layer to be one of sigmoid, hardsig"),
        (partial(ALL["SqueezeExcite"], 8, act_layer=torch.relu), TypeError, "act_layer to be a name, a module or what"),
        (
            partial(ALL["SqueezeExcite"], 8, act_layer=3),
            TypeError,
            "act_layer to be a name, a module or what makes one",
        ),
        (partial(ALL["EffectiveSqueezeExcite"]), ValueError, "EffectiveSqueezeExcite: expected channels to be a pos"),
        (partial(ALL["EffectiveSqueezeExcite"], 8, rd_rtio=4), TypeError, "unexpected keyword rd_rtio"),
        (partial(ALL["ECA"], -3), ValueError, "ECA: expected channels to be a positive integer, got -3"),
        (partial(ALL["ECA"], kernel_size=4), ValueError, "ECA: expected an odd kernel_size, got 4"),
        (partial(ALL["ECA"], padding_mode="same"), ValueError, "expected padding_mode to be one of zeros, circular"),
        (partial(ALL["ECA"], 8, use_mlp=True), TypeError, "ECA: got an unexpected keyword use_mlp"),
        (
            partial(ALL["GlobalContext"], 8, fuse_scale=False),
            ValueError,
            "expected fuse_add or fuse_scale, got neither",
        ),
        (partial(convblocks.GlobalContext.official, 8, 1 / 16), ValueError, r"inplanes \* ratio to be a positive .* 0"),
        (
            partial(convblocks.GlobalContext.official, 8, 0.5, "max"),
            ValueError,
            "pooling_type to be one of att, avg, got max",
        ),
        (
            partial(convblocks.GlobalContext.official, 8, 0.5, "att", ("add",)),
            ValueError,
            "fusion_types to be one of channel_add, channel_mul, got add",
        ),
        (partial(ALL["SimAM"], e_lambda=0), ValueError, "SimAM: expected e_lambda > 0, got 0"),
        (partial(convblocks.ChannelShuffle, 0), ValueError, "ChannelShuffle: expected groups"),
        (partial(ALL["SimAM"], lambda_=1), TypeError, "SimAM: got an unexpected keyword lambda_"),
    ],
)
def test_bad_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@each_block
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_copied_pickled_traced_exported_compiled(block: Any) -> None:
    module, x = block(CHANNELS).eval(), torch.randn(2, CHANNELS, 6, 6)
    y = module(x)
    torch.compiler.reset()
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.jit.trace(module, x),
        torch.fx.symbolic_trace(module),
        torch.export.export(module, (x,)).module(),
        torch.compile(module, fullgraph=True, backend="aot_eager"),
    ):
        torch.testing.assert_close(other(x), y)


@pytest.mark.parametrize("factory", [{"device": "meta"}, {"dtype": torch.float64}])
@each_block
def test_factory_keywords(block: Any, factory: dict[str, Any]) -> None:
    module = block(CHANNELS, **factory)
    x = torch.randn(1, CHANNELS, 4, 4).to(**factory)
    assert (module(x).dtype, module(x).device.type) == (x.dtype, x.device.type)
    assert {p.dtype for p in module.parameters()} <= {factory.get("dtype", torch.float32)}


LAYERS = {"SqueezeExcite": "fc2", "EffectiveSqueezeExcite": "fc", "ECA": "conv", "GlobalContext": "mlp_scale.fc2"}


@pytest.mark.parametrize(("name", "layer"), LAYERS.items())
def test_pruned_parametrized_and_hooked_layers(name: str, layer: str) -> None:
    """A layer that is more than its weight and bias is called."""
    x = torch.randn(2, CHANNELS, 5, 5)
    block = ALL[name](CHANNELS)
    plain = block(x)
    expected = ALL[name](CHANNELS)
    expected.load_state_dict(block.state_dict())
    with torch.no_grad():
        expected.get_submodule(layer).weight.mul_(2)
    doubled = copy.deepcopy(block)
    parametrize.register_parametrization(doubled.get_submodule(layer), "weight", _Double())
    torch.testing.assert_close(doubled(x), expected(x))
    pruned = copy.deepcopy(block)
    prune.identity(pruned.get_submodule(layer), "weight")
    for _ in range(2):  # the weight is computed anew in each step
        pruned(x).sum().backward()
    torch.testing.assert_close(pruned(x), plain)
    seen: list[int] = []
    block.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(block(x), plain)
    assert seen == [1]


class _Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight
