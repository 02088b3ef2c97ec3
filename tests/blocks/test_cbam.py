"""CBAM against timm's modules, and against the published ones as their papers and keys have them, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import Tensor, nn

import convblocks
from convblocks import backends
from tests.accelerate.sources import CHANNELS, complaint, made


def _randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """Also the running statistics of the batch norm."""
    module = made(make)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape))
        elif name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape) * 0.3)
    return module


def _run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("light", [False, True], ids=["full", "light"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_same_as_timms(
    light: bool, dtype: torch.dtype, memory_format: torch.memory_format, train: bool, backend: str, device: str
) -> None:
    """Output, all gradients and the running statistics."""
    theirs = LightCbamModule if light else CbamModule
    module = _randomised(lambda: theirs(CHANNELS, rd_ratio=1 / 4)).to(device, dtype).train(train)
    block = convblocks.CBAM(CHANNELS, 4, mlp_bias=False, momentum=0.1, light=light).to(device, dtype).train(train)
    block.load_state_dict(convblocks.convert_state_dict(module.state_dict()), strict=True)
    x = torch.randn(3, CHANNELS, 9, 7).to(device, dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    exact = _run(copy.deepcopy(module).double(), x.double(), grad.double())
    before, after = _run(module, x, grad), _run(block, x, grad)
    assert after[0].stride() == x.stride()
    for a, b, c in zip(after, before, exact, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert complaint(a, b, c) is None
    for a, b in zip(block.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def _modules(**parts: Any) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


class Official(nn.Module):
    """The authors' keys: linear layers, batch norm, and the maxima before the means."""

    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Flatten(), nn.Linear(c, r), nn.ReLU(), nn.Linear(r, c))
        self.ChannelGate = _modules(mlp=mlp)
        norm = nn.BatchNorm2d(1, momentum=0.01)
        self.SpatialGate = _modules(spatial=_modules(conv=nn.Conv2d(2, 1, 7, padding=3, bias=False), bn=norm))

    def forward(self, x: Tensor) -> Tensor:
        channel: Any = self.ChannelGate
        spatial: Any = self.SpatialGate
        s = torch.sigmoid(channel.mlp(x.mean((2, 3))) + channel.mlp(x.amax((2, 3))))
        x = x * s[:, :, None, None]
        planes = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        return x * torch.sigmoid(spatial.spatial.bn(spatial.spatial.conv(planes)))


class Pytorchcv(nn.Module):
    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        self.ch_gate = _modules(mlp=_modules(fc1=nn.Linear(c, r), fc2=nn.Linear(r, c)))
        norm = nn.BatchNorm2d(1)
        self.sp_gate = _modules(conv=_modules(conv=nn.Conv2d(2, 1, 7, padding=3, bias=False), bn=norm))

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.ch_gate.mlp
        conv: Any = self.sp_gate.conv
        s = sum(mlp.fc2(torch.relu(mlp.fc1(p))) for p in (x.mean((2, 3)), x.amax((2, 3))))
        x = x * torch.sigmoid(s)[:, :, None, None]
        return x * torch.sigmoid(conv.bn(conv.conv(torch.cat((x.amax(1, True), x.mean(1, True)), 1))))


class ExternalAttention(nn.Module):
    """A bias in place of the norm, the maxima first, and the input added."""

    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Conv2d(c, r, 1, bias=False), nn.ReLU(), nn.Conv2d(r, c, 1, bias=False))
        self.ca = _modules(se=layers)
        self.sa = _modules(conv=nn.Conv2d(2, 1, 5, padding=2))

    def forward(self, x: Tensor) -> Tensor:
        channel: Any = self.ca
        spatial: Any = self.sa
        s = channel.se(x.amax((2, 3), keepdim=True)) + channel.se(x.mean((2, 3), keepdim=True))
        y = x * torch.sigmoid(s)
        return x + y * torch.sigmoid(spatial.conv(torch.cat((y.amax(1, True), y.mean(1, True)), 1)))


class Seed(nn.Module):
    """Neither norm nor bias, and the means first."""

    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        self.ca = _modules(fc1=nn.Conv2d(c, r, 1, bias=False), fc2=nn.Conv2d(r, c, 1, bias=False))
        self.sa = _modules(conv1=nn.Conv2d(2, 1, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        channel: Any = self.ca
        spatial: Any = self.sa
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        x = x * torch.sigmoid(sum(channel.fc2(torch.relu(channel.fc1(p))) for p in pooled))
        return x * torch.sigmoid(spatial.conv1(torch.cat((x.mean(1, True), x.amax(1, True)), 1)))


PUBLISHED: dict[str, tuple[type[nn.Module], str, dict[str, Any]]] = {
    "official": (Official, "official", {}),
    "pytorchcv": (Pytorchcv, "pytorchcv", {"momentum": 0.1}),
    "external-attention": (
        ExternalAttention,
        "official",
        {"mlp_bias": False, "spatial_bn": False, "spatial_bias": True, "kernel_size": 5, "residual": True},
    ),
    "seed": (Seed, "official", {"mlp_bias": False, "spatial_bn": False, "kernel_size": 3}),
}


@pytest.mark.parametrize(("theirs", "source", "options"), PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_same_as_published(
    theirs: Callable[[int, int], nn.Module],
    source: str,
    options: dict[str, Any],
    memory_format: torch.memory_format,
    backend: str,
    device: str,
) -> None:
    """Each variant in float64, in training and evaluation, from its own state dict, detected or named."""
    module = _randomised(lambda: theirs(CHANNELS, 6)).to(device, torch.float64)
    block = convblocks.CBAM(CHANNELS, 4, **options).to(device, torch.float64)
    sd = module.state_dict()
    for converted in (convblocks.convert_state_dict(sd, source), convblocks.convert_state_dict(sd, model=block)):
        block.load_state_dict(converted, strict=True)
    x = torch.randn(3, CHANNELS, 9, 7).to(device, torch.float64).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    for train in (True, False):
        before, after = _run(module.train(train), x, grad), _run(block.train(train), x, grad)
        for i in (0, 1):
            torch.testing.assert_close(after[i], before[i])
        named = {k: g for (k, _), g in zip(module.named_parameters(), before[2:], strict=True)}
        expected = convblocks.convert_state_dict(named, source)
        for (name, _), g in zip(block.named_parameters(), after[2:], strict=True):
            torch.testing.assert_close(g, expected[name])


@pytest.mark.parametrize(
    "options", [{}, {"light": True}, {"gate_layer": "hardsigmoid", "act_layer": "silu", "residual": True}], ids=str
)
def test_halves_alone_are_the_whole(options: dict[str, Any], backend: str, device: str) -> None:
    block = made(lambda: convblocks.CBAM(CHANNELS, 4, **options)).to(device).eval()
    x = torch.randn(2, CHANNELS, 5, 6, device=device)
    torch.testing.assert_close(block(x), block.unfused(x))
    for half in (block.channel, block.spatial):
        torch.testing.assert_close(half(x), half.unfused(x))


def test_hooks_of_its_parts_see_what_they_did(backend: str, device: str) -> None:
    block = convblocks.CBAM(CHANNELS, 4).to(device)
    seen: list[Any] = []
    block.spatial.register_forward_hook(lambda m, args, y: seen.append(args[0].shape))
    x = torch.randn(2, CHANNELS, 5, 6, device=device)
    block(x)
    assert seen == [x.shape]


def test_parameters() -> None:
    """As many as the authors' block and the seed's have for 64 channels."""
    count = [
        sum(p.numel() for p in block.parameters())
        for block in (convblocks.CBAM(64), convblocks.CBAM(64, mlp_bias=False, spatial_bn=False))
    ]
    assert count == [2 * 64 * 4 + 4 + 64 + 98 + 2, 610]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: convblocks.CBAM(8), "ChannelAttention: expected a reduction that leaves a hidden unit, got 16 for 8"),
        (lambda: convblocks.CBAM(0), "ChannelAttention: expected channels to be a positive integer, got 0"),
        (lambda: convblocks.CBAM(64, kernel_size=6), "SpatialAttention: expected an odd kernel_size, got 6"),
        (lambda: convblocks.SpatialAttention(2), "SpatialAttention: expected an odd kernel_size, got 2"),
        (lambda: convblocks.CBAM(64, gate_layer="tanh"), "expected gate_layer to be one of sigmoid, hardsigmoid, got"),
        (lambda: convblocks.ChannelAttention(64, act_layer="mish"), "expected act_layer to be one of relu, "),
        (lambda: convblocks.CBAM(64, rd_channels=0), "expected rd_channels to be a positive integer, got 0"),
    ],
)
def test_bad_arguments(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(TypeError, match="CBAM: got an unexpected keyword pooling"):
        convblocks.CBAM(64, pooling="lse")


@pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spatial_bn": False, "spatial_bias": True},
        {"spatial_bias": True, "gate_layer": "hardsigmoid", "kernel_size": 3},
        {"light": True, "residual": True},
    ],
    ids=str,
)
def test_inference_in_fewer_calls(options: dict[str, Any], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """The convolution of the planes, its norm and its gate, as the modules compute them; not where one is hooked."""
    block = convblocks.CBAM(32, **options).to(dtype).eval()
    norm = block.spatial.bn
    if isinstance(norm, nn.BatchNorm2d):
        nn.init.constant_(norm.running_mean, 0.3)
        nn.init.constant_(norm.running_var, 2.0)
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, -0.2)
    x = torch.randn(3, 32, 40, 19, dtype=dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        y = block(x)
        torch.testing.assert_close(y, block.unfused(x))
        assert y.is_contiguous(memory_format=layout)
        norm.register_forward_hook(lambda _, __, z: z + 1)
        hooked = block(x)
        assert not torch.allclose(hooked, y)
        torch.testing.assert_close(hooked, block.unfused(x))


@pytest.mark.parametrize("options", [{"padding": 2, "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_another_convolution_of_the_planes(options: dict[str, Any]) -> None:
    block = convblocks.SpatialAttention(3).eval()
    block.conv = nn.Conv2d(2, 1, 3, bias=False, **options)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(block(x), block.unfused(x))
    with torch.no_grad():
        torch.testing.assert_close(block(x), block.unfused(x))


@pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 7, 11])
@pytest.mark.parametrize("size", [(1, 2, 1, 1), (2, 2, 3, 20), (5, 1, 7, 7), (1, 2, 37, 70), (2, 3, 150, 130)], ids=str)
def test_gates_of_pixels(size: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    """In bands of lines, with any number of threads; what is not finite stays in the windows that meet it."""
    planes, weight = torch.randn(size, dtype=dtype), torch.randn(1, size[1], k, k, dtype=dtype) / k
    planes[0, 0, size[2] // 2, size[3] // 3] = float("inf")
    mean, var, gamma, beta, bias = (torch.rand(1, dtype=dtype) + 0.5 for _ in range(5))
    conv = nn.functional.conv2d(planes.double(), weight.double(), bias.double(), padding=k // 2)
    expected = nn.functional.batch_norm(conv, mean.double(), var.double(), gamma.double(), beta.double(), eps=1e-3)
    numbers = (weight, bias, mean, var, gamma, beta, 1e-3)
    threads = torch.get_num_threads()
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for count in (1, threads, 3):
            torch.set_num_threads(count)
            laid_out = planes.contiguous(memory_format=layout)
            results.append(
                [torch.ops.convblocks._pixel_gates(laid_out, *numbers, gate) for gate in ("sigmoid", "hardsigmoid")]
            )
        torch.set_num_threads(threads)
        for y, gate in zip(results[0], (torch.sigmoid, nn.functional.hardsigmoid), strict=True):
            torch.testing.assert_close(y, gate(expected).to(dtype), rtol=1e-5, atol=1e-6, equal_nan=True)
        for other in results[1:]:
            assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"spatial_bn": False, "spatial_bias": True, "mlp_bias": False, "residual": True},
        {"gate_layer": "hardsigmoid", "act_layer": "silu", "kernel_size": 3, "momentum": 0.1},
    ],
    ids=["official", "biased", "hard"],
)
def test_at_once_is_the_same(
    options: dict[str, Any], dtype: torch.dtype, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At inference the block is one operation: what its parts give, with any number of threads; in float64, where no
    samples are grouped, to the last bit."""
    block = _randomised(lambda: convblocks.CBAM(24, 4, **options)).to(dtype).eval()
    for size in [(1, 24, 9, 7), (2, 24, 33, 20), (5, 24, 12, 12), (9, 24, 40, 31)]:
        x = torch.randn(size, dtype=dtype).contiguous(memory_format=layout)
        x[0, 0, 0, 0] = float("nan") if size[0] == 2 else 4.0
        results = []
        with torch.no_grad():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                y = block(x)
                with monkeypatch.context() as patch:
                    patch.setattr("convblocks.blocks.cbam._at_once", lambda *args: None)
                    parts = block(x)
                assert y.stride() == parts.stride()
                torch.testing.assert_close(y, parts, equal_nan=True)
                results += [y.nan_to_num(9), parts.nan_to_num(9)]
        if dtype == torch.float64:
            assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")
def test_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where inference is all that happens, and not where something about the block has changed."""
    module: Any = _randomised(lambda: convblocks.CBAM(24, 4)).eval()
    results: list[Tensor | None] = []
    at_once = convblocks.blocks.cbam._at_once
    monkeypatch.setattr("convblocks.blocks.cbam._at_once", lambda *args: results.append(at_once(*args)) or results[-1])
    x = torch.randn(2, 24, 9, 7)

    def runs() -> bool:
        results.clear()
        module(x)
        return bool(results) and results[-1] is not None

    spatial, channel = module.spatial, module.channel
    conv, norm = spatial.conv, spatial.bn
    assert not runs()  # a gradient is wanted
    with torch.no_grad():
        assert runs()
        for part in (module.channel, module.spatial, channel.fc1, channel.fc2, conv, norm):
            handle = part.register_forward_hook(lambda *args: None)
            assert not runs()
            handle.remove()
        module.train()
        assert not runs()
        module.eval()
        for name, value in {"dilation": (2, 2), "padding": (3, 2), "padding_mode": "reflect"}.items():
            before = getattr(conv, name)
            setattr(conv, name, value)
            if name == "padding_mode":
                assert not runs()
            else:
                with pytest.raises(ValueError, match="apply_gates"):  # gates of another size
                    runs()
            setattr(conv, name, before)
        with convblocks.use_backend("reference"):
            assert not runs()
        with torch.autocast("cpu", torch.bfloat16):
            assert not runs()
        assert runs()
        conv.weight = nn.Parameter(torch.randn(1, 2, 5, 5))  # which the padding no longer fits
        with pytest.raises(ValueError, match="apply_gates"):
            runs()
        module, x = module.bfloat16(), x.bfloat16()
        conv.weight = nn.Parameter(torch.randn(1, 2, 7, 7, dtype=x.dtype))
        assert not runs()


@pytest.mark.skipif(backends.extension_error is not None, reason="the compiled part is not built")
@pytest.mark.parametrize("layer", ["channel.fc1", "spatial.conv", "spatial.bn"])
def test_a_layer_elsewhere(layer: str) -> None:
    """Is what the operation that meets it says, not the one that would have run the block."""
    block = convblocks.CBAM(8, 2).eval()
    block.get_submodule(layer).to("meta")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"(?i)meta") as error:
        block(torch.randn(2, 8, 5, 5))
    assert "_cbam" not in str(error.value)
