"""What must be refused: with the same words on every backend, before anything is computed."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from convblocks import backends
from convblocks.opinfo import OpInfo, Sample
from tests.ops.common import each_op, operands, operator


@each_op
def test_words(info: OpInfo, backend: str, device: str) -> None:
    for bad in info.bad_inputs(device):
        with pytest.raises(bad.error) as caught:
            info.op(*bad.args, **bad.kwargs)
        assert type(caught.value) is bad.error
        assert str(caught.value).splitlines()[0] == bad.message


@each_op
def test_words_where_a_gradient_is_wanted(info: OpInfo, backend: str, device: str) -> None:
    for bad in info.bad_inputs(device):
        call = Sample(bad.args, bad.kwargs).map(lambda t: t.detach().requires_grad_(t.dtype.is_floating_point))
        with pytest.raises(bad.error, match=f"^{re.escape(bad.message)}"):
            info.op(*call.args, **call.kwargs)


@each_op
def test_nothing_is_computed(info: OpInfo, backend: str, device: str) -> None:
    bad_inputs = list(info.bad_inputs(device))
    with torch.profiler.profile() as profile:
        for bad in bad_inputs:
            with pytest.raises(bad.error):
                info.op(*bad.args, **bad.kwargs)
    names = {event.name for event in profile.events()}
    computed = {n for n in names if n.startswith("aten::")} - {"aten::is_nonzero"}
    assert not computed


@each_op
def test_words_while_tracing(info: OpInfo, dispatched: str, device: str) -> None:
    """torch.compile and torch.export see the same error, from the meta kernel."""
    mode = FakeTensorMode()
    for bad in info.bad_inputs(device):
        call = Sample(bad.args, bad.kwargs)
        if any(t.is_meta for t in call.tensors()):
            continue  # torch sees to the devices of fake tensors itself
        call = call.map(mode.from_tensor)
        with mode, pytest.raises(bad.error, match=f"^{re.escape(bad.message)}"):
            info.op(*call.args, **call.kwargs)


@each_op
def test_gradient_that_does_not_fit(info: OpInfo, dispatched: str, device: str) -> None:
    if backends.extension_error is not None:
        pytest.skip(f"no backward operator: {backends.extension_error}")
    if info.linear:  # it knows nothing of the map, and mostly refuses what the operation itself refuses
        for bad in (info.bad_gradients or info.bad_inputs)(device):
            with pytest.raises(bad.error, match=f"^{re.escape(bad.message)}"):
                operator(info, backward=True)(*bad.args, **bad.kwargs)
        return
    sample = info.sample((2, 8, 5, 3), device=device)
    args, grad = operands(info, sample), info.gradient(sample)
    size = list(grad.shape)
    for wrong, error, words in (
        (grad[:1], ValueError, f"a gradient of size {size}, got {[1, *size[1:]]}"),
        (grad[0], ValueError, f"a gradient of size {size}, got {size[1:]}"),
        (grad.double(), TypeError, "a gradient of dtype float32, got float64"),
        (grad.to("meta"), RuntimeError, f"a gradient on {grad.device} like the input, got meta"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'{info.name}: expected {words}')}"):
            operator(info, backward=True)(wrong, *args)


@each_op
def test_a_wrong_argument_type(info: OpInfo, backend: str, device: str) -> None:
    """Anything but a tensor for the map: a TypeError or so, never a crash."""
    sample = info.sample((2, 8, 5, 3), device=device)
    for wrong in (None, 1.0, "x", [sample.args[0]], sample.x.numpy(force=True)):
        with pytest.raises((TypeError, RuntimeError, AttributeError, ValueError)):
            info.op(wrong, *sample.args[1:], **sample.kwargs)
