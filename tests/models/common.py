"""What the tests of the networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import convblocks
from convblocks.models import Network, create


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """What ``make`` makes, with random statistics and factors in its norms: as made, they hide much."""
    torch.manual_seed(0)
    model = make()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for name, t in m.state_dict().items():
                if name in ("weight", "running_var"):
                    nn.init.uniform_(t, 0.5, 1.5)
                elif name in ("bias", "running_mean"):
                    nn.init.normal_(t, 0.0, 0.2)
    return model


def parameters(name: str, **options: object) -> int:
    """How many the network of this name has."""
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, **options).parameters())


def without_rounding(model: nn.Module) -> nn.Module:
    """Sets those gradients of the biases of norms to zero that are zero but for rounding, in float64.

    In training such is the bias of a norm without an activation that only convolutions and their norms see: these
    subtract it again.
    """

    def to_zero(p: Tensor) -> None:
        if p.grad is not None and float(p.grad.abs().max()) < 1e-10:
            p.grad.zero_()

    for m in model.double().modules():
        if isinstance(m, nn.BatchNorm2d):
            m.bias.register_post_accumulate_grad_hook(to_zero)
    return model


def assert_same(
    ours: Network, theirs: nn.Module, source: str | None, x: Tensor, output: Callable[..., Tensor] = lambda y: y
) -> None:
    """Loads their state dict strictly; then outputs and all gradients agree, in training and in evaluation.

    In float64, where a ReLU does not round across zero in one of the two. ``theirs`` comes from ``randomised``;
    ``output`` takes what is compared from what they return.
    """
    theirs, ours, x = theirs.double(), ours.double(), x.double()
    ours.load_state_dict(convblocks.convert_state_dict(theirs.state_dict(), source, ours), strict=True)
    for train in (False, True):
        results = []
        for model in (ours, theirs):
            image = x.clone().requires_grad_()
            y = output(model.train(train)(image))
            grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
            y.backward(grad)
            own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            results.append((y.detach(), image.grad, own))
        (y, dx, grads), (expected, expected_dx, expected_grads) = results
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        torch.testing.assert_close(dx, expected_dx, rtol=1e-7, atol=1e-7 * float(expected_dx.abs().max()))
        converted = convblocks.convert_state_dict(
            theirs.state_dict() | expected_grads, source, ours
        )  # gradients under our names
        for name, gradient in grads.items():
            expected = converted[name].view_as(gradient)
            torch.testing.assert_close(
                gradient,
                expected,
                rtol=1e-6,
                atol=1e-7 * float(expected.abs().max()),
                msg=lambda m, n=name: f"{n}: {m}",
            )
    with torch.no_grad():  # the path of inference, in float32
        ours, theirs, x = ours.float().eval(), theirs.float().eval(), x.float()
        got, expected = output(ours(x)), output(theirs(x))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        if x.dim() == 4:
            ours = ours.to(memory_format=torch.channels_last)
            got = output(ours(x.to(memory_format=torch.channels_last)))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
