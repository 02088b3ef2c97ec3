"""Random sizes, layouts, dtypes and options, found by hypothesis: what the chosen cases of the records do not reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convblocks
from convblocks.opinfo import LAYOUTS, OpInfo
from tests.conftest import BACKENDS, device_of, why_not
from tests.ops.common import accuracy, affordable, dtype_pairs, each_op, random_like, run, with_grad

# Edges of vectors, of unrolled loops and of blocks lie near powers of two.
SIDES = st.one_of(st.integers(0, 12), st.sampled_from((15, 16, 17, 31, 32, 33)))
CHANNELS = st.one_of(st.integers(1, 20), st.sampled_from((31, 32, 33, 63, 64, 65, 100)))


@pytest.mark.parametrize("name", BACKENDS)
@each_op
def test_any_call(info: OpInfo, name: str) -> None:
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name} cannot run: {reason}")
    device = device_of(name)
    examples = len(affordable(range(150), name, "", 10))

    @settings(max_examples=examples)
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
        try:
            with convblocks.use_backend("reference"):
                expected = info.op(*case.args, **case.kwargs)
        except ValueError as error:  # such as a maximum of no pixels
            with convblocks.use_backend(name), pytest.raises(ValueError) as caught:
                info.op(*sample.args, **sample.kwargs)
            assert str(caught.value).splitlines()[0] == str(error)
            return
        grad = random_like(sample.x, grad_layout, seed + 1)
        with convblocks.use_backend(name):
            results = run(info.op, sample, grad)
        assert (results[0].dtype, results[0].shape, results[0].stride()) == (
            (expected.dtype, expected.shape, expected.stride())
        )
        if sample.x.numel() == 0:
            return  # torch's own float32 and float64 differ there in what is NaN and what is 0
        wrong = accuracy(info, sample, results, grad)
        assert not wrong, "\n".join(wrong)

    check()
    assert torch.is_grad_enabled()
