"""What users do to blocks and networks after they are built."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import convblocks
from convblocks.models import create
from tests.models.common import randomised

IMAGES = (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["resnet18", "parnet_s", "densenet121", "mobilenet_v3_small", "shufflenet_v1"])
def test_folded_networks_are_the_same(name: str) -> None:
    model = randomised(lambda: create(name, num_classes=5)).eval()
    fast = copy.deepcopy(model)
    assert convblocks.accelerate(fast, fold_bn=True).replaced
    x = torch.randn(*IMAGES)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        for layout in (torch.contiguous_format, torch.channels_last):
            got = fast(x.to(memory_format=layout))
            assert (got - exact).norm() <= 1e-4 * exact.norm()


def test_aspp_trains() -> None:
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    convblocks.ASPP(8, (1, 2), 8)(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers_are_noticed(optimizer: type[torch.optim.Optimizer]) -> None:
    """They count no write; what is kept of the weights is made again after a call with gradients."""
    layers = [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers).eval()
    fast = copy.deepcopy(model)
    convblocks.accelerate(fast, fold_bn=True)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        fast(x)
    fast(x).sum().backward()
    optimizer(fast.parameters(), lr=0.3, fused=True).step()
    model.load_state_dict(fast.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_weights_in_shared_memory_are_not_kept() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval().share_memory()
    convblocks.accelerate(model, fold_bn=True)
    with torch.no_grad():
        model(torch.randn(1, 4, 8, 8))
    assert model[0].fold.kept._made is None


def test_attention_and_drop_path_that_are_set_later() -> None:
    x = torch.randn(2, 64, 8, 8)
    block = convblocks.Bottleneck(64, 16, attention="se").eval()
    block.se = None
    plain = convblocks.Bottleneck(64, 16).eval()
    plain.load_state_dict(block.state_dict(), strict=True)
    torch.testing.assert_close(block(x), plain(x))
    y = plain(x)
    plain.drop_path = 0.5
    torch.testing.assert_close(plain(x), y)


def test_attention_starts_as_it_says() -> None:
    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)
            nn.init.zeros_(self.conv.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv(x).sigmoid()

    for name in (
        "resnet18",
        "vgg11",
        "densenet121",
        "mobilenet_v2",
        "squeezenet1_1",
        "ghostnet",
        "fasternet_t0",
        "unet",
    ):
        gates = [m for m in create(name, attention=Gate).modules() if isinstance(m, Gate)]
        assert gates
        assert not any(gate.conv.weight.any() for gate in gates)
    for m in create("gc_resnet18").modules():
        assert not isinstance(m, convblocks.GlobalContext) or not m.mlp_add.fc2.weight.any()


def test_norms_do_not_write_over_what_is_needed() -> None:
    x = torch.randn(2, 8, 128, 128)
    norm = randomised(lambda: convblocks.BatchNormAct2d(8, "relu", inplace=True)).eval()
    expected = norm(x)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
        tangent = forward_ad.unpack_dual(norm(dual)).tangent
    by_grad = torch.func.jvp(lambda a: norm(a), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, by_grad)
    with torch.inference_mode():
        given = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(norm(given), expected)
    model, seen = create("densenet121", num_classes=2).eval(), []
    model.features.denseblock4.register_forward_hook(lambda m, args, y: seen.extend((y, y.clone())))
    with torch.no_grad():
        model(torch.randn(3, 3, 224, 224))
    assert torch.equal(*seen)


def test_a_traced_network_changes_its_mode() -> None:
    model = randomised(lambda: create("resnet18", num_classes=2)).train()
    traced = torch.fx.symbolic_trace(model).eval()
    x = torch.randn(*IMAGES)
    torch.testing.assert_close(traced(x), model.eval()(x))


def test_cbam_is_traced_by_torch_jit() -> None:
    model = create("resnet18", attention="cbam", num_classes=2).eval()
    x = torch.randn(*IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_ensembles_by_vmap() -> None:
    models = [create("densenet121", num_classes=2).eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        both = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(both, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-5)


def test_a_folded_norm_may_be_parametrized() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    expected = model(torch.ones(1, 4, 8, 8))
    convblocks.accelerate(model, fold_bn=True)
    nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(model(torch.ones(1, 4, 8, 8)), expected)


def test_torchs_sync_batch_norm_is_refused() -> None:
    """Torch's conversion makes a norm without activation of any norm."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(create("vgg11_bn", num_classes=2, hidden=8))
    with pytest.raises(RuntimeError, match=r"vgg11_bn: expected norms with what follows them, got nn.SyncBatchNorm"):
        model.train()


def test_a_trunk_takes_the_weights_of_the_whole() -> None:
    whole, trunk = create("resnet18"), create("resnet18", features_only=True)
    trunk.load_state_dict(convblocks.convert_state_dict(whole.state_dict(), model=trunk))
    assert not [key for key in create("unet", features_only=True).state_dict() if key.startswith("up")]


def test_parameters_are_in_torchvisions_order() -> None:
    import torchvision

    for name in ("resnet18", "resnet50"):
        theirs = getattr(torchvision.models, name)()
        assert list(create(name).state_dict()) == list(theirs.state_dict())


def test_places_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"ResNet: expected attention_stages of 1 to 4, got \(9,\)"):
        create("resnet18", attention="se", attention_stages=(9,))
    with pytest.raises(ValueError, match=r"ResNet: expected dilated to be of 3 stages, got \(True,\)"):
        create("resnet18", dilated=(True,))


def test_leaky_relu_of_any_slope_is_differentiable() -> None:
    norm = convblocks.BatchNormAct2d(3, "leaky_relu", negative_slope=-0.5)
    norm(torch.randn(2, 3, 4, 4)).sum().backward()


@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("vgg11_bn", "features"),
        ("mobilenet_v2", "features"),
        ("densenet121", "features"),
        ("squeezenet1_1", "features"),
        ("ghostnet", "blocks"),
        ("mobilenet_v3_small", "features"),
        ("fasternet_t0", "stages"),
        ("fasternet_t0", "stages.1.blocks.0.mlp"),
        ("darknet53", "stages"),
        ("resnet18", "layer3"),
        ("xception", "block5.rep"),
        ("shufflenet_v1", "features.1.branch_main_1"),
        ("parnet_s", "streams.0.0.block.se.cvsig"),
        ("parnet_s", "inits.0.0.block.se"),
        ("parnet_s", "inits.0.0.block.rbr_1x1"),
        ("scse_unet", "encoder"),
        ("scse_unet", "encoder.layer3"),
        ("deeplabv3_resnet50", "backbone"),
        ("deeplabv3_resnet50", "backbone.layer3"),
    ],
)
def test_hooks_on_containers_run(name: str, container: str) -> None:
    """Once for an image, with what goes in and comes out, which they may replace."""
    model = create(name, num_classes=3).eval()
    module, x = model.get_submodule(container), torch.randn(1, 3, 64, 64)
    seen = []
    with torch.no_grad():
        expected = model(x)
        hook = module.register_forward_hook(lambda m, args, y: seen.append((args[0].shape, y)))
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
        assert len(seen) == 1
        hook.remove()
        module.register_forward_hook(
            lambda m, args, y: torch.full_like(y, 1e4) if isinstance(y, Tensor) else [1e4 + z for z in y]
        )
        assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("part", ["pool", "conv", "hook"])
def test_a_transition_that_was_changed_does_not_commute(part: str) -> None:
    block, x = convblocks.Transition(16).eval(), torch.randn(1, 16, 8, 8)
    if part == "pool":
        block.pool = nn.MaxPool2d(2)
    elif part == "conv":
        block.conv = nn.Conv2d(16, 8, 3, padding=1, bias=False)
    else:
        block.pool.register_forward_hook(lambda m, args, y: y * 0.5 + 1)
    expected = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


def test_dropout_is_the_same_without_gradients() -> None:
    """As activation checkpointing runs a network: once without them, and once more with them."""
    model, x = create("squeezenet1_1", num_classes=4).train(), torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_simam_of_one_pixel() -> None:
    x = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(convblocks.SimAM()(x), x * torch.sigmoid(torch.tensor(0.5)))
    assert create("resnet18", attention="simam").eval()(torch.randn(2, 3, 32, 32)).isfinite().all()
