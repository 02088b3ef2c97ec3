"""torch.func, autocast, copies, tracing by make_fx and TorchScript: against the same done to the reference."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from convblocks import backends
from convblocks.accuracy import run
from convblocks.opinfo import OpInfo, Options, Sample
from tests.ops.common import as_function, each_op, each_option, operands, operator, random_like, with_grad

Function = Callable[..., Tensor]


def _both(info: OpInfo, options: Options | None, device: str) -> tuple[Sample, Function, Function]:
    sample = info.sample((2, 4, 3, 3), options, dtype=torch.float64, device=device)
    return sample, as_function(info.op, sample), as_function(info.reference, sample)


class Layer(nn.Module):
    """One call with its parameters, as a module that knows no operation by name."""

    def __init__(self, info: OpInfo, channels: int, options: Options | None = None) -> None:
        super().__init__()
        sample = info.sample((1, channels, 7, 7), options)
        self.op, self.kwargs, self.fixed = info.op, sample.kwargs, sample.args[1:]
        self.channels = None if info.maps is None else [t.shape[1] for t in sample.maps]
        self.out_channels = info.output(sample).shape[1]
        self.per_sample = info.per_sample
        self.weights = nn.ParameterList(() if info.per_sample else sample.parameters())

    def forward(self, x: Tensor) -> Tensor:
        given = iter(self.weights if self.per_sample is None else self.per_sample(x))
        args = [next(given) if isinstance(a, Tensor) else a for a in self.fixed]
        maps = x if self.channels is None else list(x.split(self.channels, 1))
        return self.op(maps, *args, **self.kwargs)


@each_option
def test_grad_and_vjp(info: OpInfo, options: Options, backend: str, device: str) -> None:
    sample, op, reference = _both(info, options, device)
    tensors = sample.tensors()
    every = tuple(range(len(tensors)))
    for argnums in (0, every):
        got = grad(lambda *t: op(*t).square().sum(), argnums)(*tensors)
        torch.testing.assert_close(got, grad(lambda *t: reference(*t).square().sum(), argnums)(*tensors))
    g = info.gradient(sample)
    torch.testing.assert_close(vjp(op, *tensors)[1](g), vjp(reference, *tensors)[1](g))


@each_option
def test_jvp(info: OpInfo, options: Options, backend: str, device: str) -> None:
    sample, op, reference = _both(info, options, device)
    tensors = tuple(sample.tensors())
    tangents = tuple(random_like(t) if t.dim() == 4 else torch.ones_like(t) for t in tensors)
    got, expected = jvp(op, tensors, tangents), jvp(reference, tensors, tangents)
    assert got[1].abs().max() > 0
    torch.testing.assert_close(got, expected)
    only_x = jvp(lambda x: reference(x, *tensors[1:]), tensors[:1], tangents[:1])[1]
    with forward_ad.dual_level():
        y = op(forward_ad.make_dual(tensors[0], tangents[0]), *tensors[1:])
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, only_x)


@each_op
def test_forward_mode_where_a_gradient_is_wanted_too(info: OpInfo, backend: str, device: str) -> None:
    sample, op, reference = _both(info, None, device)
    tensors = with_grad(sample).tensors()
    results = []
    for function in (op, reference):
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(tensors[0], random_like(tensors[0])), *tensors[1:])
            primal, tangent = forward_ad.unpack_dual(y)
            results.append((tangent, *torch.autograd.grad((primal * tangent).sum(), tensors)))
    torch.testing.assert_close(*results)


@each_option
def test_vmap(info: OpInfo, options: Options, backend: str, device: str, recwarn: pytest.WarningsRecorder) -> None:
    """Over a batch of maps, of parameters, of both; also with the batch in another place, and per-sample gradients."""
    sample, op, reference = _both(info, options, device)
    tensors = sample.tensors()
    many = [torch.stack((t, t + 1, t * 2)) for t in tensors]
    for dims in ([0] * len(tensors), [0] + [None] * (len(tensors) - 1), [None] + [0] * (len(tensors) - 1)):
        if all(d is None for d in dims):
            continue
        args = [m if d == 0 else t for m, t, d in zip(many, tensors, dims, strict=True)]
        torch.testing.assert_close(vmap(op, tuple(dims))(*args), vmap(reference, tuple(dims))(*args))
    rest = (None,) * (len(tensors) - 1)
    moved = vmap(op, (3, *rest), out_dims=1)(many[0].movedim(0, 3), *tensors[1:])
    torch.testing.assert_close(moved, vmap(reference, (0, *rest), out_dims=1)(many[0], *tensors[1:]))

    maps = len(sample.maps if info.per_sample is None else tensors)
    each = (0,) * maps + (None,) * (len(tensors) - maps)

    def loss(function: Function) -> Function:
        return lambda *t: function(*(x[None] for x in t[:maps]), *t[maps:]).square().sum()

    per_sample = vmap(grad(loss(op), tuple(range(len(tensors)))), each)(*tensors)
    expected = vmap(grad(loss(reference), tuple(range(len(tensors)))), each)(*tensors)
    torch.testing.assert_close(per_sample, expected)
    assert not [w for w in recwarn if "batching rule" in str(w.message)]


@each_op
def test_vmap_over_the_backward_operator(info: OpInfo, dispatched: str, device: str) -> None:
    if backends.extension_error is not None:
        pytest.skip(f"no backward operator: {backends.extension_error}")
    sample = info.sample((2, 4, 3, 3), dtype=torch.float64, device=device)
    gradients = torch.stack([info.gradient(sample, seed=seed) for seed in range(3)])
    leaves = with_grad(sample)
    y = info.op(*leaves.args, **leaves.kwargs)
    batched = torch.autograd.grad(y, leaves.tensors(), gradients, is_grads_batched=True)
    for i, g in enumerate(gradients):
        torch.testing.assert_close([b[i] for b in batched], run(info.op, with_grad(sample), g)[1:])


@each_op
def test_jacobians_and_hessian(info: OpInfo, backend: str, device: str) -> None:
    sample = info.sample((1, 2, 2, 2), dtype=torch.float64, device=device)
    op, reference = as_function(info.op, sample), as_function(info.reference, sample)
    tensors = sample.tensors()
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(op)(*tensors), jacobian(reference)(*tensors))
    hessian = jacfwd(jacrev(lambda *t: op(*t).square().sum()))(*tensors)
    torch.testing.assert_close(hessian, jacfwd(jacrev(lambda *t: reference(*t).square().sum()))(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_op
def test_autocast(info: OpInfo, dtype: torch.dtype, backend: str, device: str) -> None:
    """As with timm's gates the result has the dtype of the map, and the kernels compute as without autocast. What
    stands for a convolution computes in the dtype of autocast, as torch's does."""
    sample = info.sample((2, 8, 5, 3), dtype=dtype, parameter_dtype=torch.float32, device=device)
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.autocast(device, low):
        y = info.op(*sample.args, **sample.kwargs)
    same = sample.map(lambda t: t.to(low)) if info.autocasts else sample
    assert y.dtype == same.x.dtype
    if backend != "reference":
        assert torch.equal(y, info.op(*same.args, **same.kwargs))


@each_op
def test_copies_of_a_module_that_calls_it(info: OpInfo, backend: str, device: str) -> None:
    layer = Layer(info, 8).to(device)
    x = torch.randn(2, 8, 5, 3, device=device)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    assert torch.equal(functional_call(layer, dict(layer.named_parameters()), (x,)), y)


@each_op
def test_make_fx_keeps_one_node(info: OpInfo, dispatched: str, device: str) -> None:
    sample = info.sample((2, 8, 5, 3), device=device)
    graph = make_fx(as_function(info.op, sample), tracing_mode="symbolic")(*sample.tensors())
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    if backends.extension_error is None:
        assert called == [operator(info)]
    other = info.sample((3, 8, 9, 4), seed=1, device=device)
    torch.testing.assert_close(graph(*other.tensors()), info.op(*other.args, **other.kwargs))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@each_op
def test_torchscript(info: OpInfo, dispatched: str, device: str) -> None:
    """A trace of the function, and a script that calls the operator."""
    sample, other = info.sample((2, 8, 5, 3), device=device), info.sample((3, 8, 6, 7), seed=1, device=device)
    expected = info.op(*other.args, **other.kwargs)
    traced = torch.jit.trace(as_function(info.op, sample), tuple(sample.tensors()))
    torch.testing.assert_close(traced(*other.tensors()), expected)
    arguments = operator(info)._schema.arguments
    signature = ", ".join(f"{a.name}: {a.type.annotation_str}" for a in arguments)
    call = f"torch.ops.convblocks.{info.name}({', '.join(a.name for a in arguments)})"
    script = torch.jit.CompilationUnit(f"def run({signature}) -> Tensor:\n    return {call}\n")
    torch.testing.assert_close(script.run(*operands(info, other)), expected)


@each_op
def test_a_tensor_subclass_stays_one(info: OpInfo, backend: str, device: str) -> None:
    class Tagged(Tensor):
        pass

    sample = info.sample((2, 8, 5, 3), device=device)
    y = as_function(info.op, sample)(sample.x.as_subclass(Tagged), *sample.tensors()[1:])
    assert type(y) is Tagged
