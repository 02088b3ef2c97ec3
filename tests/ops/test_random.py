"""Random sizes, layouts, dtypes and options, found by hypothesis: what the chosen cases of the records do not reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import convblocks
from convblocks.accuracy import run
from convblocks.opinfo import LAYOUTS, OpInfo, Sample
from convblocks.ops.operator import memory_format
from tests.conftest import BACKENDS, device_of, why_not
from tests.ops.common import SLOW, accuracy, dtype_pairs, each_op, with_grad

# Edges of vectors, of unrolled loops and of blocks lie near powers of two.
SIDES = st.one_of(st.integers(0, 12), st.sampled_from((15, 16, 17) if SLOW else (15, 16, 17, 31, 32, 33)))
CHANNELS = st.one_of(st.integers(1, 20), st.sampled_from((15, 16, 17) if SLOW else (31, 32, 33, 63, 64, 65, 100)))


def _refusal(info: OpInfo, sample: Sample, name: str) -> str | None:
    """The error of a call, if it has one."""
    try:
        with convblocks.use_backend(name):
            info.op(*sample.args, **sample.kwargs)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


@pytest.mark.parametrize("name", BACKENDS)
@each_op
def test_any_call(info: OpInfo, name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name} cannot run: {reason}")
    device = device_of(name)

    @settings(max_examples=10 if SLOW else 150, phases=[Phase.generate] if SLOW else list(Phase))
    @given(
        size=st.tuples(st.integers(0, 3), CHANNELS, SIDES, SIDES),
        options=st.sampled_from(info.options),
        dtypes=st.sampled_from(dtype_pairs(info)),
        layout=st.sampled_from(list(LAYOUTS)),
        grad_layout=st.sampled_from(list(LAYOUTS)),
        seed=st.integers(0, 1000),
    )
    def check(size, options, dtypes, layout, grad_layout, seed) -> None:  # type: ignore[no-untyped-def]
        dtype, parameter_dtype = dtypes
        case = info.sample(
            size, options, dtype=dtype, parameter_dtype=parameter_dtype, layout=layout, device=device, seed=seed
        )
        sample = with_grad(case)
        refusal = _refusal(info, case, "reference")
        assert _refusal(info, case, name) == refusal  # such as a maximum of no pixels
        if refusal is not None:
            return
        grad = info.gradient(sample, grad_layout, seed + 1)
        with convblocks.use_backend(name):
            results = run(info.op, sample, grad)
        y = results[0]
        assert (y.dtype, y.shape) == (dtype, info.output(case).shape)
        if y.numel() == 0:
            return  # torch's own float32 and float64 differ there in what is NaN and what is 0
        assert y.stride() == torch.empty(y.shape, memory_format=memory_format(sample.x), device="meta").stride()
        wrong = accuracy(info, sample, results, grad)
        assert not wrong, "\n".join(wrong)

    check()
