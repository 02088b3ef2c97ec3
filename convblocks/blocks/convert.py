"""Reads the state dicts of other implementations into the key layout of this package.

A layout is a name and the steps that turn it into ours. A step maps a state dict to a state dict and leaves alone what
it does not know, so that a block's and a whole network's state dict go through the same steps, and a layout is
recognised by its steps changing something.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from convblocks.blocks.checkpoint import read_state_dict

StateDict = dict[str, Any]
Step = Callable[[StateDict], StateDict]


def rename(pattern: str, to: str | Callable[[re.Match[str]], str]) -> Step:
    """A step that gives the keys that match ``pattern`` as a whole another name, as ``re.sub`` does."""
    compiled = re.compile(pattern)
    return lambda sd: {compiled.sub(to, k) if compiled.fullmatch(k) else k: v for k, v in sd.items()}


def _rename_layer(sd: StateDict, old: str, new: str) -> StateDict:
    """Renames a layer, and gives the weight of a linear layer the shape of that of a 1x1 convolution."""
    converted = {}
    for key, value in sd.items():
        if key in (f"{old}.weight", f"{old}.bias"):
            key = new + key.removeprefix(old)
            if isinstance(value, Tensor) and value.dim() == 2:
                value = value[:, :, None, None]
        converted[key] = value
    return converted


def _is_pointwise(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() in (2, 4) and t.shape[2:].numel() == 1


def bottleneck(first: str, second: str, hosts: str = r".*") -> Step:
    """A step that makes squeeze-excite's ``fc1`` and ``fc2`` of two layers, wherever they squeeze and excite.

    The shapes, [R, C] and [C, R], tell a squeeze-excite from two other layers of these names; ``hosts`` restricts the
    prefix in addition. An empty prefix counts only where there is nothing but these layers.
    """
    host = re.compile(hosts)

    def step(sd: StateDict) -> StateDict:
        for key in list(sd):
            prefix = key.removesuffix(f"{first}.weight")
            alone = all(k.rpartition(".")[0] in (first, second) for k in sd)
            if prefix == key or not host.fullmatch(prefix) or not (prefix.endswith(".") or alone):
                continue
            w1: Any = sd[key]
            w2: Any = sd.get(f"{prefix}{second}.weight")
            if _is_pointwise(w1) and _is_pointwise(w2) and w1.shape[:2] == w2.shape[:2][::-1]:
                sd = _rename_layer(sd, prefix + first, f"{prefix}fc1")
                sd = _rename_layer(sd, prefix + second, f"{prefix}fc2")
        return sd

    return step


def one_layer(name: str, hosts: str) -> Step:
    """A step that makes effective squeeze-excite's ``fc`` of a pointwise layer from C to C channels."""
    host = re.compile(hosts)

    def step(sd: StateDict) -> StateDict:
        for key, weight in list(sd.items()):
            prefix = key.removesuffix(f"{name}.weight")
            alone = all(k.rpartition(".")[0] == name for k in sd)
            if prefix == key or not (host.fullmatch(prefix) or (prefix == "" and alone)):
                continue
            if _is_pointwise(weight) and weight.shape[0] == weight.shape[1]:
                sd = _rename_layer(sd, prefix + name, f"{prefix}fc")
        return sd

    return step


def separable(depthwise: str, bn1: str, pointwise: str, bn2: str) -> Step:
    """A step that makes a depthwise-separable convolution's ``conv_dw``, ``bn1``, ``conv_pw``, ``bn2`` of four layers.

    Shapes tell it from two other convolutions of these names; the norms need not be there.
    """

    def step(sd: StateDict) -> StateDict:
        for key, w1 in list(sd.items()):
            prefix = key.removesuffix(f"{depthwise}.weight")
            w2: Any = sd.get(f"{prefix}{pointwise}.weight")
            if prefix == key or not (prefix.endswith(".") or prefix == "") or not _is_pointwise(w2):
                continue
            if isinstance(w1, Tensor) and w1.dim() == 4 and w1.shape[1] == 1 and w1.shape[0] == w2.shape[1]:
                names = ((depthwise, "conv_dw"), (bn1, "bn1"), (pointwise, "conv_pw"), (bn2, "bn2"))
                layers = {prefix + old: prefix + new for old, new in names}
                parts = [(k.rpartition("."), v) for k, v in sd.items()]
                sd = {f"{layers.get(host, host)}{dot}{name}": v for (host, dot, name), v in parts}
        return sd

    return step


def global_context() -> Step:
    """A step that makes global context's layers of those of the official ContextBlock, which mmcv has, too."""
    layers = {"0": "fc1", "1": "norm", "3": "fc2"}
    names = {"channel_add_conv": "mlp_add", "channel_mul_conv": "mlp_scale"}
    pattern = re.compile(r"(.*\.)?(channel_add_conv|channel_mul_conv)\.([013])\.(weight|bias)")
    mask = re.compile(r"(.*\.)?conv_mask\.(weight|bias)")

    def step(sd: StateDict) -> StateDict:
        converted = {}
        for key, value in sd.items():
            found, attention = pattern.fullmatch(key), mask.fullmatch(key)
            if found:
                prefix, transform, layer, name = found.groups(default="")
                key = f"{prefix}{names[transform]}.{layers[layer]}.{name}"
                if layer == "1" and isinstance(value, Tensor):
                    value = value.flatten()
            elif attention:
                key = "{}conv_attn.{}".format(*attention.groups(default=""))
            converted[key] = value
        return converted

    return step


def spatial_attention(old: str, maxima_first: bool) -> Step:
    """A step that makes CBAM's ``spatial.conv`` and ``spatial.bn`` of layers under another name. Our convolution sees
    the means first."""
    pattern = re.compile(rf"((?:.*\.)?){old}\.((?:conv|bn)\..+)")

    def step(sd: StateDict) -> StateDict:
        converted = {}
        for key, value in sd.items():
            found = pattern.fullmatch(key)
            if found is None:
                converted[key] = value
                continue
            is_planes = found[2] == "conv.weight" and isinstance(value, Tensor) and value.dim() == 4
            converted[f"{found[1]}spatial.{found[2]}"] = value.flip(1) if is_planes and maxima_first else value
        return converted

    return step


@dataclass(frozen=True)
class Layout:
    """A name, and the steps that turn what has it into ours. A network has its own, in ``layouts``."""

    name: str
    steps: tuple[Step, ...]

    def convert(self, sd: StateDict) -> StateDict:
        for step in self.steps:
            sd = step(sd)
        return sd


_SE_MODULE = rename(r"(.*\.)?se_module\.(.+)", r"\1se.\2")  # Cadene's networks, and timm's and smp's copies of them

LAYOUTS = (
    Layout("convblocks", ()),
    Layout("torchvision", ()),
    Layout(
        "timm",
        (
            _SE_MODULE,
            bottleneck("conv_reduce", "conv_expand"),
            one_layer("conv", r".*\batt\."),
            separable("conv1", "bn1", "pointwise", "bn2"),  # Xception
            separable("conv_dw", "bn_dw", "conv_pw", "bn_pw"),  # aligned Xception
            spatial_attention(r"spatial\.conv", maxima_first=False),
        ),
    ),
    Layout(
        "segmentation_models_pytorch",
        (
            rename(r"(.*\.)?cSE\.1\.(.+)", r"\1cSE.fc1.\2"),
            rename(r"(.*\.)?cSE\.3\.(.+)", r"\1cSE.fc2.\2"),
            rename(r"(.*\.)?sSE\.0\.(.+)", r"\1sSE.conv.\2"),
            separable("0", "2", "1", "3"),
        ),
    ),
    # moskomule's senet.pytorch and External-Attention (two linear layers), ECANet, the authors' scSE (linear, too) and
    # CBAM
    Layout(
        "official",
        (
            _SE_MODULE,
            bottleneck("fc.0", "fc.2"),
            bottleneck("fc1", "fc2", r"(.*\.)?cSE\."),
            bottleneck("Conv_Squeeze", "Conv_Excitation", r"(.*\.)?cSE\."),
            rename(r"(.*\.)eca\.(conv\..+)", r"\1se.\2"),
            global_context(),
            separable("conv", "bn1", "pointwise", "bn2"),
            separable("depthwise_conv", "bn1", "pointwise_conv", "bn2"),
            separable("depth_conv.0", "depth_conv.1", "point_conv.0", "point_conv.1"),
            rename(r"(.*\.)?(?:ChannelGate|ca)\.((?:mlp|se|fc\d).+)", r"\1channel.\2"),
            bottleneck("mlp.1", "mlp.3", r"(.*\.)?channel\."),
            bottleneck("se.0", "se.2", r"(.*\.)?channel\."),
            rename(r"(.*\.)?sa\.conv1\.(.+)", r"\1spatial.conv.\2"),
            spatial_attention(r"SpatialGate\.spatial", maxima_first=True),
            spatial_attention("sa", maxima_first=True),
        ),
    ),
    Layout(
        "pytorchcv",
        (
            bottleneck("conv1", "conv2", r"|.*\bse\."),
            bottleneck("fc1", "fc2"),
            separable("dw_conv.conv", "dw_conv.bn", "pw_conv.conv", "pw_conv.bn"),
            separable("dw_conv", "bn1", "pw_conv", "bn2"),
            rename(r"(.*\.)?ch_gate\.(.+)", r"\1channel.\2"),
            bottleneck("mlp.fc1", "mlp.fc2", r"(.*\.)?channel\."),
            spatial_attention(r"sp_gate\.conv", maxima_first=True),
        ),
    ),
    Layout(
        "efficientnet_pytorch",
        (
            bottleneck("_se_reduce", "_se_expand", r""),
            rename(r"(.*\.)_se_reduce\.(.+)", r"\1se.fc1.\2"),
            rename(r"(.*\.)_se_expand\.(.+)", r"\1se.fc2.\2"),
        ),
    ),
)


def _steps(name: str) -> tuple[Step, ...]:
    """Those of the blocks' layout of this name."""
    return next((layout.steps for layout in LAYOUTS if layout.name == name), ())


def _without_wrappers(sd: StateDict) -> StateDict:
    """Drops the prefixes that DataParallel and torch.compile put before all keys, and milesial's values of classes."""
    sd = {k: v for k, v in sd.items() if k != "mask_values"}
    for prefix in ("module.", "_orig_mod."):
        if sd and all(k.startswith(prefix) for k in sd):
            return _without_wrappers({k.removeprefix(prefix): v for k, v in sd.items()})
    return sd


def _sizes(sd: StateDict) -> dict[str, Any]:
    return {k: getattr(v, "shape", None) for k, v in sd.items()}


def _misfit(sd: StateDict, model: nn.Module) -> list[str]:
    """What keeps ``model`` from loading ``sd`` strictly."""
    given, expected = _sizes(sd), _sizes(model.state_dict())
    optional = {k for k in expected if k.endswith("num_batches_tracked")}  # torch adds it to checkpoints before 0.4.1
    wrong = [f"no {k}" for k in expected.keys() - given.keys() - optional]
    wrong += [f"an unknown {k}" for k in given.keys() - expected.keys()]
    for k in expected.keys() & given.keys():
        if given[k] != expected[k]:
            wrong.append(f"{k} of size {list(given[k] or ())} instead of {list(expected[k] or ())}")
    return sorted(wrong)


def convert_state_dict(
    sd: Mapping[str, Any] | str | os.PathLike[str], source: str | None = None, model: nn.Module | None = None
) -> StateDict:
    """Renames and reshapes the entries of a state dict so that the modules of this package load it strictly.

    Known layouts, of a block or of a whole network: "timm" (EfficientNet's ``conv_reduce`` / ``conv_expand``,
    ``se_module``, HGNet's one-layer ``att.conv``), "torchvision", "official" (the linear layers ``fc.0`` / ``fc.2``
    of senet.pytorch and External-Attention, those of the authors of scSE and CBAM, ECANet's ``eca``, the ContextBlock
    of GCNet and mmcv), "pytorchcv" (``conv1`` / ``conv2``), "efficientnet_pytorch" (``_se_reduce`` / ``_se_expand``),
    "segmentation_models_pytorch" (the numbered layers of its scSE), "convblocks"; of most also the names of a
    depthwise-separable convolution's layers. The prefixes of DataParallel and torch.compile are dropped.

    Args:
        sd: a state dict; it stays as it is. The result shares its tensors. Or a file of one, which is read with
            ``weights_only=True``; one that ends in .safetensors by that package. What training scripts store beside
            it, under ``state_dict``, ``model_state_dict`` or ``model``, is left out.
        source: the layout; detected when None.
        model: the module that is to load the result; helps to tell layouts apart, and is checked against.

    Returns:
        A new dict in our layout; entries that no layout knows are kept as they are.

    Raises:
        TypeError: sd is not a mapping from names to tensors, nor such a file.
        ImportError: a file of safetensors without that package.
        ValueError: a file that holds more than tensors, an unknown source, keys that fit several layouts in different
            ways, or a result that ``model`` cannot load.

    Example:
        >>> sd = {"fc.0.weight": torch.randn(4, 64), "fc.2.weight": torch.randn(64, 4)}
        >>> convblocks.SqueezeExcite(64, 4, bias=False).load_state_dict(convblocks.convert_state_dict(sd))
        <All keys matched successfully>
    """
    if isinstance(sd, (str, os.PathLike)):
        sd = read_state_dict(sd)
    if not isinstance(sd, Mapping) or not all(isinstance(k, str) for k in sd):
        raise TypeError(f"convert_state_dict: expected a mapping from names to tensors, got {type(sd).__name__}")
    nested = [k for k, v in sd.items() if isinstance(v, Mapping)]
    if nested:
        raise TypeError(f"convert_state_dict: expected a mapping from names to tensors, got a mapping at {nested[0]!r}")
    own = getattr(model, "layouts", ())
    layouts = [Layout(o.name, o.steps + _steps(o.name)) for o in own]
    layouts += [layout for layout in LAYOUTS if layout.name not in {o.name for o in own}]
    names = [layout.name for layout in layouts]
    if source is not None and source not in names:
        raise ValueError(f"convert_state_dict: expected source to be one of {', '.join(names)}, got {source}")
    plain = _without_wrappers(dict(sd))
    results = [plain]
    for layout in layouts if source is None else [layout for layout in layouts if layout.name == source]:
        result = layout.convert(plain)
        if all(_sizes(result) != _sizes(r) for r in results):
            results.append(result)
    if getattr(model, "features_only", False):  # a network that does without the layers that make classes
        unused = tuple(f"{name}." for name in getattr(model, "head_layers", ()))
        results = [{k: v for k, v in r.items() if not k.startswith(unused)} for r in results]
    if model is not None:
        result = min(results, key=lambda r: len(_misfit(r, model)))
        wrong = _misfit(result, model)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            got = ", ".join(wrong[:5]) + more
            raise ValueError(f"convert_state_dict: expected the state dict of a {type(model).__name__}, got {got}")
        return result
    if len(results) > 2:
        raise ValueError(
            "convert_state_dict: expected keys of one layout, got keys that fit several: give source or model"
        )
    return results[-1]
