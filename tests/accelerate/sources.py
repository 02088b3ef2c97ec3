"""Modules of the foreign classes that accelerate() knows, over their options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

pytest.importorskip("segmentation_models_pytorch")

from segmentation_models_pytorch.base.modules import SCSEModule as SmpSCSEModule  # noqa: E402
from segmentation_models_pytorch.encoders._senet import SEModule as SmpSEModule  # noqa: E402
from timm.layers import (  # noqa: E402
    CecaModule,
    Conv2dSame,
    EcaModule,
    EffectiveSEModule,
    GlobalContext,
    SEModule,
)
from timm.layers.cbam import CbamModule, LightCbamModule  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite  # noqa: E402
from timm.models.fasternet import Partial_conv3  # noqa: E402
from timm.models.hgnet import EseModule  # noqa: E402
from timm.models.senet import SEModule as SenetSEModule  # noqa: E402
from torchvision.models.shufflenetv2 import InvertedResidual  # noqa: E402
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402

CHANNELS = 24


SOURCES: dict[str, Callable[[], nn.Module]] = {
    "se": partial(SEModule, CHANNELS),
    "se-maxpool": partial(SEModule, CHANNELS, add_maxpool=True),
    "se-no-bias": partial(SEModule, CHANNELS, bias=False),
    "se-hardsigmoid": partial(SEModule, CHANNELS, gate_layer="hard_sigmoid"),
    **{
        f"se-{act}": partial(SEModule, CHANNELS, act_layer=timm.layers.get_act_layer(act))
        for act in ("relu6", "silu", "gelu", "gelu_tanh", "hard_swish", "leaky_relu")
    },
    "se-torch-gelu-tanh": partial(SEModule, CHANNELS, act_layer=lambda inplace: nn.GELU("tanh")),
    "efficientnet": partial(SqueezeExcite, CHANNELS),
    "efficientnet-hard": partial(SqueezeExcite, CHANNELS, act_layer="hard_swish", gate_layer="hard_sigmoid"),
    "senet": partial(SenetSEModule, CHANNELS, 4),
    "smp": partial(SmpSEModule, CHANNELS, 4),
    "smp-scse": partial(SmpSCSEModule, CHANNELS),
    "ese": partial(EffectiveSEModule, CHANNELS),
    "ese-maxpool-sigmoid": partial(EffectiveSEModule, CHANNELS, add_maxpool=True, gate_layer="sigmoid"),
    "hgnet": partial(EseModule, CHANNELS),
    "eca": partial(EcaModule, CHANNELS),
    "eca-k7": partial(EcaModule, kernel_size=7, gate_layer="hard_sigmoid"),
    "eca-k1": partial(EcaModule, kernel_size=1),
    "ceca": partial(CecaModule, kernel_size=5),
    "gc-mean": partial(GlobalContext, CHANNELS, use_attn=False, fuse_add=True, rd_channels=5),
    "ceca-bias": partial(CecaModule, CHANNELS, act_layer=nn.ReLU),
    "cbam": partial(CbamModule, CHANNELS, rd_ratio=1 / 4),
    "cbam-hard": partial(CbamModule, CHANNELS, spatial_kernel_size=3, gate_layer="hard_sigmoid", mlp_bias=True),
    "light-cbam": partial(LightCbamModule, CHANNELS, rd_ratio=1 / 4),
    "depthwise": partial(nn.Conv2d, CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "depthwise-5": partial(
        nn.Conv2d, CHANNELS, CHANNELS, 5, padding=(4, 2), dilation=(2, 1), groups=CHANNELS, bias=False
    ),
    "depthwise-same": partial(nn.Conv2d, CHANNELS, CHANNELS, (4, 3), padding="same", groups=CHANNELS),
    "timm-same": partial(Conv2dSame, CHANNELS, CHANNELS, 4, groups=CHANNELS),
    "partial-conv": partial(Partial_conv3, CHANNELS, 4, "split_cat"),
    "torchvision": partial(SqueezeExcitation, CHANNELS, 6),
    "torchvision-silu": partial(SqueezeExcitation, CHANNELS, 6, activation=partial(nn.SiLU, inplace=True)),
    "torchvision-hard": partial(SqueezeExcitation, CHANNELS, 6, scale_activation=nn.Hardsigmoid),
    "shuffle": partial(nn.ChannelShuffle, 3),
    "shufflenet": partial(InvertedResidual, CHANNELS, CHANNELS, 1),
    "shufflenet-stride-2": partial(InvertedResidual, CHANNELS, 2 * CHANNELS, 2),
}

each_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with weights that move the gate away from a half, and not beyond the kinks of hardsigmoid."""
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.dim() == 1 else 1.5 / p[0].numel() ** 0.5))
    return module


def complaint(after: Tensor, before: Tensor, exact: Tensor) -> str | None:
    """Why a result is not as accurate as the original's, by the error of the whole tensor; or None.

    The largest error of one value, which the tests of the operations judge, would tell as much of the kinks of the
    activations: a value that is rounded to their other side has another gradient.
    """
    size, eps = exact.norm().item(), torch.finfo(after.dtype).eps
    error, error_before = ((t.double() - exact).norm().item() for t in (after, before))
    slack = 1e-7 if after.dtype == torch.float64 else 8 * eps  # torch's hardsigmoid has a float32 gradient everywhere
    allowed = 2 * error_before + slack * size
    return None if error <= allowed else f"error {error:.2e} of {size:.2e}, allowed {allowed:.2e}"


def network() -> nn.Module:
    """Small, with one module of each library."""
    return nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3),
        nn.BatchNorm2d(CHANNELS),
        SEModule(CHANNELS),
        nn.ReLU(inplace=True),
        EcaModule(CHANNELS),
        nn.Conv2d(CHANNELS, CHANNELS, 3),
        SqueezeExcitation(CHANNELS, 6),
    )
