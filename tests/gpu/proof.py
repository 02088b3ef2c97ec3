"""What is proven about the GPU kernels of every operation, for both checkers: they differ in how they watch a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from convblocks.accuracy import run
from convblocks.opinfo import LAYOUTS, OPS, OpInfo, Options, Size
from tests.gpu.traffic import Traffic
from tests.ops.common import accuracy, backward_operands, dtype_pairs, operands, operator, with_grad
from tests.ops.variants import WITH_SUMS

Watch = Callable[..., AbstractContextManager[Traffic]]


def _cases() -> Iterator[Any]:
    """The first option in every dtype; each other one in float32 and one more in turn, the rest being slow."""
    for info in (*OPS.values(), WITH_SUMS):
        pairs = dtype_pairs(info)
        for i, options in enumerate(info.options):
            for j, dtypes in enumerate(pairs):
                often = i == 0 or j in (0, 1 + i % (len(pairs) - 1))
                names = "-".join(str(d).removeprefix("torch.") for d in dtypes)
                marks = () if often else pytest.mark.slow
                yield pytest.param(info, options, *dtypes, id=f"{info.name}-{i}-{names}", marks=marks)


each_case = pytest.mark.parametrize(("info", "options", "dtype", "parameter_dtype"), list(_cases()))


def prove(
    info: OpInfo, options: Options, dtype: torch.dtype, parameter_dtype: torch.dtype, watch: Watch, start: int
) -> None:
    """Forward and backward in every layout: no fault in the code, and the accuracy that the shared tests ask for. The
    sizes take turns; ``start`` says where."""
    layouts = list(LAYOUTS)
    for i, layout in enumerate(layouts):
        size = info.sizes[(start + i) % len(info.sizes)]
        sample = with_grad(info.sample(size, options, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout))
        grad = info.gradient(sample, layouts[(start + 2 * i) % len(layouts)])
        with watch(*sample.tensors(), grad):
            results = run(info.op, sample, grad)
        wrong = accuracy(info, sample, results, grad)
        assert not wrong, f"{size} {layout}: {wrong}"


# Maps of which a GPU can hold a plane, or in channels_last the planes that share its sectors.
each_traffic = pytest.mark.parametrize(
    ("info", "size", "dtype", "layout", "backward"),
    [
        pytest.param(info, size, dtype, layout, backward, id=f"{info.name}-{layout}-{size[2]}-{direction}-{dtype}")
        for info in OPS.values()
        for dtype in (torch.float32, torch.bfloat16)
        for layout, size, direction in (
            ("contiguous", (2, 8, 28, 28), "forward"),
            ("contiguous", (1, 2, 112, 112), "forward"),
            ("contiguous", (2, 8, 28, 28), "backward"),
            ("contiguous", (1, 2, 56, 56), "backward"),
            ("channels_last", (2, 32, 28, 28), "forward"),
            ("channels_last", (2, 32, 14, 14), "backward"),
        )
        for backward in (direction == "backward",)
    ],
)


def prove_traffic(info: OpInfo, size: Size, dtype: torch.dtype, layout: str, backward: bool, watch: Watch) -> None:
    """What a GPU has to keep on chip is not fetched again: bytes in whole sectors against ``least_bytes``."""
    n, c, h, w = size
    if c < info.traffic_channels:
        n, c, h, w = 1, info.traffic_channels, 28, 28
    sample = info.sample((n, c, h, w), info.bench[0], dtype=dtype, layout=layout)
    arguments = operands(info, sample)
    if backward:
        arguments = backward_operands(info, sample, info.gradient(sample, layout))
    with watch(*(a for a in tree_leaves(arguments) if isinstance(a, Tensor))) as traffic:
        operator(info, backward)(*arguments)
    least = info.least_bytes(sample, backward)
    assert traffic.moved <= info.gpu_traffic[backward] * least, f"{traffic.moved / least:.3f} of least_bytes: {traffic}"
