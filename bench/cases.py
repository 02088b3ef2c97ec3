"""What is measured: the cases of a preset, and the same case as a call of ours, of a peer or of the exact reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convblocks.opinfo import TIMED, OpInfo, Options, Sample, Size

MODES = ("fwd", "fwd+bwd")  # inference under no_grad; forward, then the gradients of the input and the parameters
PEER_KINDS = ("eager", "compile")
PEER_LAYOUTS = ("contiguous", "channels_last")

# Feature maps of ResNet, MobileNet and EfficientNet at batch 1, 8 and 32, then sizes that no kernel is made for.
NETWORK_SIZES: tuple[Size, ...] = (
    (1, 96, 56, 56),
    (1, 32, 112, 112),
    (8, 64, 56, 56),
    (8, 256, 28, 28),
    (8, 512, 14, 14),
    (8, 1152, 7, 7),
    (32, 64, 56, 56),
)
ODD_SIZES: tuple[Size, ...] = ((4, 40, 28, 28), (2, 100, 33, 33), (16, 24, 112, 112), (3, 72, 57, 31), (1, 1280, 7, 7))


@dataclass(frozen=True)
class Preset:
    sizes: tuple[Size, ...]
    dtypes: tuple[torch.dtype, ...]
    seconds: float  # of timing per case
    fraction: float  # of the sizes that an operation has for itself

    def sizes_of(self, info: OpInfo, options: Options) -> tuple[Size, ...]:
        """Those of the preset, or where networks have the operation in other places, of these."""
        own = dict(zip(map(str, info.bench), info.bench_sizes, strict=False)).get(str(options), ())
        return own[: math.ceil(self.fraction * len(own))] or self.sizes


PRESETS = {
    "quick": Preset(((1, 96, 56, 56), (8, 256, 28, 28), (8, 1152, 7, 7)), (torch.float32,), 2.5, 0.4),
    "full": Preset(NETWORK_SIZES + ODD_SIZES, (torch.float32, torch.bfloat16), 4.0, 1.0),
}


@dataclass(frozen=True)
class Case:
    """One interleaved measurement: ours in every layout, the peers, and a copy. It gives one row per layout."""

    op: str
    options: Options
    size: Size
    dtype: torch.dtype
    mode: str
    layouts: tuple[str, ...]
    device: torch.device

    def __str__(self) -> str:
        size, dtype = ",".join(map(str, self.size)), str(self.dtype).removeprefix("torch.")
        return f"{self.op} ({size}) {dtype} {self.mode}"

    @property
    def info(self) -> OpInfo:
        return TIMED[self.op]

    def sample(self, layout: str, seed: int) -> Sample:
        return self.info.sample(
            self.size,
            self.options,
            dtype=self.dtype,
            layout=layout,
            device=self.device,
            seed=seed,
            requires_grad=self.mode != "fwd",
        )

    def grad(self, sample: Sample, seed: int) -> Tensor:
        """The gradient that comes in."""
        return self.info.gradient(sample, seed=seed + 1)


def plan(
    ops: Iterable[str],
    sizes: Callable[[OpInfo, Options], Iterable[Size]],
    dtypes: Iterable[torch.dtype],
    modes: Iterable[str],
    layouts: tuple[str, ...],
    device: torch.device,
) -> list[Case]:
    return [
        Case(op, options, size, dtype, mode, layouts, device)
        for op, dtype, mode in itertools.product(ops, dtypes, modes)
        for options in TIMED[op].bench
        for size in sizes(TIMED[op], options)
    ]


def call(function: Callable[..., Tensor], sample: Sample, case: Case, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """A call without arguments that returns the output and, with ``fwd+bwd``, the gradients of all tensor inputs."""

    def forward() -> Tensor:
        return function(*sample.args, **sample.kwargs)

    if case.mode == "fwd":
        return lambda: (forward(),)
    y = forward()
    # Laid out as this callee lays out its output, so that nobody pays for a conversion.
    grad = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(case.grad(sample, seed))
    inputs = sample.tensors()

    def forward_and_backward() -> tuple[Tensor, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, inputs, grad))

    return forward_and_backward


def peer(kind: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The reference as torch runs it: eager, or compiled for exactly these sizes and without graph breaks."""
    if kind == "eager":
        return reference
    compiled: Any = torch.compile(reference, dynamic=False, fullgraph=True)
    return compiled  # type: ignore[no-any-return]


def convert(sample: Sample, layout: str) -> Sample:
    """The same values with the feature maps in ``layout``, one of PEER_LAYOUTS."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    def leaf(t: Tensor) -> Tensor:
        memory_format = formats[layout] if any(t is x for x in sample.maps) else torch.preserve_format
        return t.detach().clone(memory_format=memory_format).requires_grad_(t.requires_grad)

    return sample.map(leaf)
