"""Compares a replacement with what it replaces, on copies of the module and a small random input."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from convblocks.accelerate.rule import Refused, Rule, become


def _run(rule: Rule, module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and, where the original has them, the gradients of the input and of all parameters, for a random
    gradient of the output."""
    if not rule.differentiable(module):
        with torch.no_grad():
            return [module(x)]
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu").to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    module = copy.deepcopy(module).to(dtype)
    for p in module.parameters():
        p.requires_grad_()
    return module


def _distance(t: Tensor, exact: Tensor) -> float:
    """The relative error of the whole tensor."""
    return float((t.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))


def _error(rule: Rule, module: nn.Module, fast: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        2, rule.channels(module), *rule.pixels(module), generator=generator, dtype=torch.float64, device="cpu"
    )
    x = x.to(device, dtype)
    try:
        original = _run(rule, _copy(module, dtype), x)
        exact = _run(rule, _copy(module, torch.float64), x.double())
    except Exception as e:
        raise Refused(f"it does not run on an input of {dtype}: {e}") from e
    try:
        ours = _run(rule, _copy(fast, dtype), x)
    except Exception as e:
        raise Refused(f"the replacement does not run on an input of {dtype}: {e}") from e
    if [t.dtype for t in ours] != [t.dtype for t in original]:
        raise Refused("the replacement's output or gradients are of another dtype")
    if dtype.itemsize == 2:  # what is rounded to the other side of a kink has another gradient: float32 has to tell
        ours = ours[:1]
    # In float64 the yardstick errs, too: torch's gradient of hardsigmoid multiplies by a sixth in float32.
    slack = 1e-7 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps
    # What is 0 but for rounding, such as the gradient of a bias that attention does not change with: in float64 the
    # yardstick's rounding is the original's, and an exact 0 would be refused.
    largest = max(float(t.norm()) for t in exact)
    nothing = 64 * largest if math.isfinite(largest) else 0.0
    worst = 0.0
    for i, (a, b, c) in enumerate(zip(ours, original, exact, strict=False)):
        if c.norm() <= nothing * torch.finfo(c.dtype).eps and a.double().norm() <= nothing * torch.finfo(dtype).eps:
            continue
        missed, missed_before = _distance(a, c), _distance(b, c)
        if not missed <= 4 * missed_before + slack:
            what = "gradient" if i else "output"
            raise Refused(f"the replacement's {what} is off by {missed:.1e} where it was off by {missed_before:.1e}")
        worst = max(worst, missed)
    return worst


def error(rule: Rule, module: nn.Module, cls: type[nn.Module], options: Mapping[str, str], parameter: Tensor) -> float:
    """The relative error of the replacement's output and gradients, on the device and in the dtype of ``parameter``;
    raises Refused if they are not the original's.

    The yardstick is the original in float64: the replacement may miss it by four times what the original misses it by
    in its own dtype, and a little. That is wider than the rule of this package's tests: what is looked for here is
    another function, such as a foreign class changed by a new release, and a false alarm would cost the speed.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(parameter.device.type, enabled=False):
        fast = copy.deepcopy(module)
        become(fast, cls, options)
        worst = _error(rule, module, fast, parameter.device, parameter.dtype)
        if parameter.dtype.itemsize == 2:
            _error(rule, module, fast, parameter.device, torch.float32)
    return worst
