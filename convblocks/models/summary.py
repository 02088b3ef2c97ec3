"""What a network consists of: its blocks, their sizes and parameters, multiply-accumulates, and the bytes it moves.

All from runs on the meta device, where no number is computed: ``python -m convblocks models`` and ``describe``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from convblocks import backends
from convblocks.blocks.attention import ATTENTIONS
from convblocks.models.network import Network
from convblocks.models.registry import ENTRIES
from convblocks.tables import Table

EPILOGUE = "norm, activation, residual"
_KINDS = {
    "batch_norm": EPILOGUE,
    "scale_shift_act": EPILOGUE,
    **dict.fromkeys(("relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "add"), EPILOGUE),
    **dict.fromkeys(("sigmoid", "mul", "rsqrt", "addcmul"), EPILOGUE),
    **dict.fromkeys(("cat", "clone", "copy", "_to_copy", "constant_pad_nd"), "concatenation, shuffle, copy"),
    **dict.fromkeys(("channel_shuffle", "concat_shuffle"), "concatenation, shuffle, copy"),
    **dict.fromkeys(("mean", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"), "pooling"),
    **dict.fromkeys(("addmm", "mm"), "linear"),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), "upsampling"),
    "depthwise_conv2d": "depthwise and grouped convolution",
    "partial_conv2d": "k x k convolution",
}
_ATTENTION = tuple(cls for cls in ATTENTIONS.values() if isinstance(cls, type))


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _kind(name: str, args: Any) -> str:
    if name == "convolution":
        weight, groups = args[1], args[8]
        if groups > 1:
            return "depthwise and grouped convolution"
        return "1 x 1 convolution" if weight.shape[2:].numel() == 1 else "k x k convolution"
    stem = name.removesuffix("_")
    return next((kind for key, kind in _KINDS.items() if stem == key or ("norm" in key and key in stem)), "other")


class _Traffic(TorchDispatchMode):
    """Bytes that the operations read and write, each tensor once an operation; views are free."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.bytes: Counter[str] = Counter()
        self.within: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace in ("aten", "convblocks"):
            name = func._schema.name.split("::")[1]
            made = _tensors(result) or [t for t in _tensors(args)[:1] if func._schema.is_mutable]
            if made and name not in ("empty", "detach", "_unsafe_view", "empty_like"):
                moved = sum(t.numel() * t.element_size() for t in (*_tensors((args, kwargs)), *made))
                self.bytes[self.within[-1] if self.within else _kind(name, args)] += moved
        return result


@contextmanager
def _attributed(network: nn.Module, traffic: _Traffic) -> Iterator[None]:
    """What runs within attention counts as such."""
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, _ATTENTION):
                enter = module.register_forward_pre_hook(lambda *_: traffic.within.append("attention"))
                leave = module.register_forward_hook(lambda *_: [traffic.within.pop(), None][1])
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        yield


@dataclass(frozen=True)
class Part:
    """A layer or block, and how often the same one follows."""

    name: str
    kind: str
    size: tuple[int, ...]
    parameters: int
    count: int = 1


def meta(name: str, **options: Any) -> Network:
    """A network without numbers, for inference."""
    with torch.device("meta"):
        return ENTRIES[name](**options).eval()


def _image(network: Network, size: int) -> Tensor:
    return torch.empty(1, network.in_channels, size, size, device="meta")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(network: Network, size: int) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), backends.use_backend("reference"), counter:
        network(_image(network, size))
    return counter.get_total_flops() // 2


def traffic(network: Network, size: int) -> dict[str, Counter[str]]:
    """Bytes moved by kind of operation for one image: as torch runs the layers one by one, and as they are here."""
    found = {}
    for backend in ("reference", "auto"):
        mode = _Traffic()
        with torch.no_grad(), backends.use_backend(backend), _attributed(network, mode), mode:
            network(_image(network, size))
        found[backend] = mode.bytes
    return {"eager": found["reference"], "ours": found["auto"]}


def parts(network: Network, size: int) -> list[Part]:
    """The layers and blocks in the order in which they run; runs of the same become one."""
    blocks = [(n, m) for n, m in network.named_modules() if n and _is_part(m)]
    tops = [(n, m) for n, m in blocks if not any(n.startswith(f"{o}.") for o, _ in blocks)]
    found: list[Part] = []

    def record(name: str, module: nn.Module, y: Any) -> None:
        shape = tuple(y.shape[1:]) if isinstance(y, Tensor) else ()
        part = Part(name, type(module).__name__, shape, parameters(module))
        last = found[-1] if found else None
        if last and (last.kind, last.size, last.parameters) == (part.kind, part.size, part.parameters):
            part = Part(last.name, last.kind, last.size, last.parameters, last.count + 1)
            found.pop()
        found.append(part)

    with ExitStack() as stack:
        for name, module in tops:
            hook = module.register_forward_hook(lambda m, _, y, n=name: record(n, m, y))
            stack.callback(hook.remove)
        with torch.no_grad():
            network(_image(network, size))
    return found


def _is_part(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("convblocks.blocks.") or not list(module.children())
    return own and not isinstance(module, (nn.Identity, nn.Sequential))


def describe(name: str, size: int | None, options: dict[str, Any]) -> str:
    """The whole of it as text."""
    network = meta(name, **options)
    pixels = size or ENTRIES[name].image_size
    structure = Table(f"{name}, an image of {pixels} x {pixels}", ["layer", "kind", "output", "parameters"])
    for part in parts(network, pixels):
        times = f"  x {part.count}" if part.count > 1 else ""
        out = " x ".join(map(str, part.size))
        structure.add(part.name, f"{part.kind}{times}", out, f"{part.parameters * part.count:,}")
    total = f"{parameters(network):,} parameters, {macs(network, pixels) / 1e9:.3f} G multiply-accumulates"
    moved = traffic(network, pixels)
    table = Table("Bytes moved in inference, float32, batch 1", ["operation", "eager", "ours", "share of eager"])
    eager, ours = moved["eager"], moved["ours"]
    for kind, count in eager.most_common():
        table.add(kind, *_megabytes(count, ours[kind]), f"{count / eager.total():.0%}")
    for kind in ours.keys() - eager.keys():
        table.add(kind, *_megabytes(0, ours[kind]), "0%")
    table.add("all", *_megabytes(eager.total(), ours.total()), "100%")
    return f"{structure}\n\n{total}\n\n{table}"


def _megabytes(*counts: int) -> tuple[str, ...]:
    return tuple(f"{count / 1e6:.1f} MB" for count in counts)


def listing(pattern: str) -> Table:
    """A row for each network whose name contains the pattern."""
    title = "Networks: convblocks.models.<name>(num_classes=..., attention=...)"
    columns = ["name", "parameters", "G multiply-accumulates", "image", "keys of", "reads"]
    table = Table(title, columns)
    for name, entry in ENTRIES.items():
        if pattern in name:
            network = meta(name)
            others = ", ".join(layout.name for layout in network.layouts)
            count = f"{macs(network, entry.image_size) / 1e9:.3f}"
            table.add(name, f"{parameters(network):,}", count, str(entry.image_size), network.native, others)
    return table
