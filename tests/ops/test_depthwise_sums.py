"""The second output of depthwise_conv2d: the shared tests, over a record that joins both outputs."""

from __future__ import annotations

import pytest
import torch

from convblocks import backends
from convblocks.opinfo import OPS, Options
from convblocks.ops import depthwise_conv2d
from tests.ops import test_gradients, test_operator, test_parity, test_transforms
from tests.ops.common import SLOW, both_layouts, once, operands
from tests.ops.variants import WITH_SUMS

each_option = pytest.mark.parametrize("options", WITH_SUMS.options, ids=str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@each_option
def test_sizes_and_layouts(options: Options, dtype: torch.dtype, backend: str, device: str) -> None:
    test_parity.test_sizes_and_layouts(WITH_SUMS, options, dtype, dtype, 2 if SLOW else 10**9, backend, device)


@both_layouts
def test_many_bands(layout: str, backend: str, device: str) -> None:
    """Planes whose sums come from several pieces of work."""
    sample = WITH_SUMS.sample((1, 17, 50, 41) if SLOW else (1, 33, 112, 113), layout=layout, device=device)
    test_parity.assert_accurate(WITH_SUMS, sample, WITH_SUMS.gradient(sample))


@both_layouts
@each_option
def test_derivatives(options: Options, layout: str, backend: str, device: str) -> None:
    test_gradients.test_gradcheck(WITH_SUMS, options, layout, backend, device)
    if not SLOW:
        test_gradients.test_gradgradcheck(WITH_SUMS, options, layout, backend, device)
    test_transforms.test_jvp(WITH_SUMS, options, backend, device)


@each_option
def test_transforms_and_vmap(options: Options, backend: str, device: str, recwarn: pytest.WarningsRecorder) -> None:
    test_transforms.test_grad_and_vjp(WITH_SUMS, options, backend, device)
    test_transforms.test_vmap(WITH_SUMS, options, backend, device, recwarn)


@each_option
def test_outputs_are_written_and_the_same_each_time(options: Options, backend: str, device: str) -> None:
    test_operator.test_every_output_is_written(WITH_SUMS, options, backend, device)
    test_operator.test_repeatable(WITH_SUMS, options, backend, device)
    test_operator.test_inputs_stay_as_they_were(WITH_SUMS, options, "crop", backend, device)


@both_layouts
def test_first_output_is_the_same_and_the_second_its_sum(layout: str, backend: str, device: str) -> None:
    sample = WITH_SUMS.sample((2, 33, 13, 15), layout=layout, device=device)
    y, sums = depthwise_conv2d(*sample.args, **sample.kwargs, sums=True)
    assert torch.equal(y, depthwise_conv2d(*sample.args, **sample.kwargs))
    assert sums.shape == (2, 33)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, y.sum((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_output(used: int, backend: str, device: str) -> None:
    sample = WITH_SUMS.sample((2, 5, 6, 7), dtype=torch.float64, device=device, requires_grad=True)
    y = OPS["depthwise_conv2d"].reference(*sample.args, **sample.kwargs)
    expected = torch.autograd.grad((y, y.sum((2, 3)))[used].square().sum(), sample.tensors())
    outputs = depthwise_conv2d(*sample.args, **sample.kwargs, sums=True)
    torch.testing.assert_close(torch.autograd.grad(outputs[used].square().sum(), sample.tensors()), expected)


def test_nothing_in(backend: str, device: str) -> None:
    x, weight = torch.zeros(0, 4, 5, 5, device=device), torch.zeros(4, 1, 3, 3, device=device)
    y, sums = depthwise_conv2d(x, weight, sums=True)
    assert y.shape == (0, 4, 3, 3)
    assert sums.shape == (0, 4)


def test_bad_inputs(backend: str, device: str) -> None:
    for bad in OPS["depthwise_conv2d"].bad_inputs(device):
        with pytest.raises(bad.error) as caught:
            depthwise_conv2d(*bad.args, **bad.kwargs, sums=True)
        assert str(caught.value).startswith(bad.message)


@both_layouts
def test_opcheck(layout: str, dispatched: str, device: str) -> None:
    sample = WITH_SUMS.sample((2, 6, 5, 7), layout=layout, device=device, requires_grad=True)
    plain = OPS["depthwise_conv2d"]
    torch.library.opcheck(torch.ops.convblocks.depthwise_conv2d_sums.default, operands(plain, sample))


@once
def test_compiled_and_exported(dispatched: str, device: str) -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y, sums = depthwise_conv2d(x, weight, padding=1, activation="silu", sums=True)
            return y * sums.sigmoid()[:, :, None, None]

    x, weight = torch.randn(2, 8, 9, 9, device=device), torch.randn(8, 1, 3, 3, device=device)
    x.requires_grad_()
    expected = Net()(x, weight)
    compiled = torch.compile(Net(), fullgraph=True, dynamic=True)(x, weight)
    torch.testing.assert_close(compiled, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (compiled, expected)]
    torch.testing.assert_close(*gradients)
    program = torch.export.export(Net(), (x.detach(), weight))
    torch.testing.assert_close(program.module()(x.detach(), weight), expected)
    kept = "depthwise_conv2d_sums" in str(program.graph)
    assert kept == (backends.extension_error is None)  # else it is the reference, which is taken apart


def test_autocast(backend: str, device: str) -> None:
    x, weight = torch.randn(2, 4, 6, 6, device=device), torch.randn(4, 1, 3, 3, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        y, sums = depthwise_conv2d(x, weight, sums=True)
    assert y.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
