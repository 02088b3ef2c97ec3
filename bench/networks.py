"""Times the networks of this package at inference against torchvision's and timm's own, on the same weights.

Run as ``python -m bench.networks [--batch 1] [--seconds 5] [names]``, on the CPU. A network is timed only if its output
is that of the other. The exit status is 1 if one is not, and 2 if a library is missing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import convblocks
from bench.demo import LAYOUTS
from bench.machine import header
from bench.tables import machine
from bench.timing import CpuClock, interleave

try:
    import segmentation_models_pytorch as smp
    import timm
    import torchvision
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
except ImportError as e:
    needs = "segmentation_models_pytorch, timm, torchvision and rich"
    print(f"networks: expected {needs}, got: {e} (pip install 'convblocks[test,bench]')", file=sys.stderr)
    sys.exit(2)

_MODELS = torchvision.models
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg16": _MODELS.vgg16,
    "vgg16_bn": _MODELS.vgg16_bn,
    "resnet18": _MODELS.resnet18,
    "resnet50": _MODELS.resnet50,
    "se_resnet50": lambda: timm.create_model("seresnet50"),
    "resnext50_32x4d": _MODELS.resnext50_32x4d,
    "res2net50_26w_4s": lambda: timm.create_model("res2net50_26w_4s"),
    "inception_v1": lambda: _MODELS.googlenet(init_weights=False, aux_logits=False),
    "inception_v3": lambda: _MODELS.inception_v3(init_weights=False, aux_logits=False),
    "inception_v4": lambda: timm.create_model("inception_v4"),
    "inception_resnet_v2": lambda: timm.create_model("inception_resnet_v2"),
    "xception": lambda: timm.create_model("legacy_xception"),
    "densenet121": _MODELS.densenet121,
    "darknet53": lambda: timm.create_model("darknet53"),
    "squeezenet1_1": _MODELS.squeezenet1_1,
    "mobilenet_v1": lambda: timm.create_model("mobilenetv1_100"),
    "mobilenet_v2": _MODELS.mobilenet_v2,
    "mobilenet_v3_large": _MODELS.mobilenet_v3_large,
    "efficientnet_v2_s": _MODELS.efficientnet_v2_s,
    "shufflenet_v2_x1_0": _MODELS.shufflenet_v2_x1_0,
    "ghostnet": lambda: timm.create_model("ghostnet_100"),
    "fasternet_t0": lambda: timm.create_model("fasternet_t0"),
    "deeplabv3_resnet50": lambda: _MODELS.segmentation.deeplabv3_resnet50(weights_backbone=None),
    "scse_unet": lambda: smp.Unet("resnet34", encoder_weights=None, decoder_attention_type="scse"),
}
_OPTIONS = {"darknet53": {"negative_slope": 0.01}}  # of ours, where they are not theirs


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours, with the same weights, and norms that know their maps: else some magnify what is rounded."""
    torch.manual_seed(0)
    theirs = NETWORKS[name]().train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    theirs(torch.randn(4, 3, 224, 224))
    theirs.eval()
    ours = convblocks.models.create(name, **_OPTIONS.get(name, {})).eval()
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), model=ours))
    return theirs, ours


def _map(y: Any) -> Tensor:
    result: Tensor = y["out"] if isinstance(y, dict) else y  # of torchvision's segmentation networks
    return result


def _agree(ours: nn.Module, theirs: nn.Module, x: Tensor) -> bool:
    """Whether ours is about as close to theirs in float64 as theirs is in float32."""
    exact = _map(copy.deepcopy(theirs).double()(x.double()))
    error, least = ((_map(model(x)) - exact).abs().max() for model in (ours, theirs))
    return bool(error <= 2 * least + 1e-5 * exact.abs().max())


def measure(name: str, batch: int, seconds: float) -> dict[str, tuple[float, float]] | None:
    """Milliseconds of theirs and of ours in each layout, or None if they do not agree."""
    theirs, ours = _pair(name)
    if not all(_agree(ours, theirs, torch.randn(2, 3, 224, 224).contiguous(memory_format=f)) for f in LAYOUTS.values()):
        return None
    calls: dict[str, Callable[[], Any]] = {}
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=memory_format)
        for who, model in (("theirs", theirs), ("ours", ours)):
            own = copy.deepcopy(model).to(memory_format=memory_format)
            calls[f"{who} {layout}"] = lambda own=own, x=x: own(x)
    times = {call: 1e3 * timing.min for call, timing in interleave(calls, CpuClock(), seconds).items()}
    return {layout: (times[f"theirs {layout}"], times[f"ours {layout}"]) for layout in LAYOUTS}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NETWORKS)}; all by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing per network")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.names if name not in NETWORKS]:
        parser.error(f"expected names of {', '.join(NETWORKS)}, got {unknown[0]}")
    table = Table("network", *(f"{what} {layout}" for layout in LAYOUTS for what in ("ms", "speed-up")), box=SIMPLE)
    gains: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    wrong = False
    with torch.no_grad():
        for name in chosen.names or NETWORKS:
            times = measure(name, chosen.batch, chosen.seconds)
            if times is None:
                wrong = True
                table.add_row(name, *["does not agree"] * (2 * len(LAYOUTS)))
                continue
            cells = []
            for layout, (before, after) in times.items():
                gains[layout].append(before / after)
                cells += [f"{before:.1f} -> {after:.1f}", f"{before / after:.2f}"]
            table.add_row(name, *cells)
    means = [[""] if not g else ["", f"{statistics.geometric_mean(g):.2f}"] for g in gains.values()]
    table.add_row("geometric mean", *(cell for pair in means for cell in pair))
    console = Console(width=120)
    console.print(f"{machine(header(torch.device('cpu'), 0, 0))}; batch {chosen.batch}, 224 x 224, float32, eval")
    console.print(table)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
