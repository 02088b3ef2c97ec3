"""Compares a replacement with what it replaces, on copies of the module and a small random input."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from convblocks.accelerate.rule import Refused, Rule, become


def _run(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def _copy(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for p in module.parameters():
        p.requires_grad_()
    return module


def error(rule: Rule, module: nn.Module, cls: type[nn.Module], options: dict[str, str]) -> float:
    """The largest relative error of the replacement's output and gradients; raises Refused if it is not the original's.

    The yardstick is the original in float64: the replacement may miss it by four times what the original misses it by
    in its own dtype, and a little. That is wider than the rule of this package's tests: what is looked for here is
    another function, such as a foreign class changed by a new release, and a false alarm would cost the speed.
    """
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, rule.channels(module), 5, 6, generator=generator, dtype=torch.float64, device="cpu")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(parameter.device.type, enabled=False):
        x, grad = x.to(parameter), grad.to(parameter)
        fast = _copy(module)
        become(fast, cls, options)
        try:
            original = _run(_copy(module), x, grad)
            exact = _run(_copy(module).double(), x.double(), grad.double())
        except Exception as e:
            raise Refused(f"it does not run on an input of {x.dtype}: {e}") from e
        try:
            ours = _run(fast, x, grad)
        except Exception as e:
            raise Refused(f"the replacement does not run: {e}") from e
    slack = {2: 2, 4: 32, 8: 1000}[x.dtype.itemsize] * torch.finfo(x.dtype).eps  # in float64 the yardstick errs, too
    worst = 0.0
    for a, b, c in zip(ours, original, exact, strict=True):
        scale = c.abs().max().item()
        missed, missed_before = ((t.double() - c).abs().max().item() for t in (a, b))
        if a.dtype != b.dtype or not missed <= 4 * missed_before + slack * scale:
            raise Refused(
                f"the replacement does not agree: off by {missed:.1e} where it was off by {missed_before:.1e}"
            )
        worst = max(worst, missed / scale if scale else missed)
    return worst
