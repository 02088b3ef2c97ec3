from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from convblocks import backends
from convblocks.blocks.arguments import Layer, function_name
from convblocks.ops.gate import ACTIVATIONS
from convblocks.ops.scale_shift_act import operator

INPLACE: dict[str, Callable[[Tensor], Tensor]] = {  # those whose gradient asks for no more than their output
    "relu": partial(F.relu, inplace=True),
    "relu6": partial(F.relu6, inplace=True),
}
_LARGE = 1 << 17  # elements from which a new map costs more than the longer way of writing over one


def scale_shift(norm: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a norm does at inference: a factor and an offset for each channel, in float32 at least.

    With a ``bias``, to what comes from a convolution before that is added.
    """
    parts = (bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    bias, mean, var, gamma, beta = (t.float() if t is not None and t.dtype.itemsize == 2 else t for t in parts)
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if gamma is None else scale * gamma
    mean = mean if bias is None else mean - bias
    return scale, -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)


def _may_be_written(x: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.numel() < _LARGE:
        return False
    kept = x.is_inference() and not torch.is_inference_mode_enabled()
    return not (kept or forward_ad._current_level >= 0 or torch._C._functorch.is_functorch_wrapped_tensor(x))


class BatchNormAct2d(nn.BatchNorm2d):
    """Batch norm with what follows it in a network: perhaps a residual that is added, then an activation.

    ``y = act(norm(x) + residual)``. In eval mode that is one pass over memory (``convblocks.ops.scale_shift_act``); in
    training torch computes the norm. Ioffe et al., "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv 1502.03167. The keys of the state dict are those of ``nn.BatchNorm2d``.

    Args:
        num_features: channels C.
        activation: a name, a module, or a class or partial that makes one; "none": nothing.
        eps, momentum, affine, track_running_stats, device, dtype: of ``nn.BatchNorm2d``.
        negative_slope: of the activation leaky_relu.
        inplace: lets inference write over x, which nothing else may need then.

    It is an ``nn.BatchNorm2d``; ``nn.SyncBatchNorm.convert_sync_batchnorm`` would take residual and activation away,
    ``convblocks.convert_sync_batchnorm`` does not.

    Shape: (N, C, H, W) to the same; the residual, too.

    Raises:
        ValueError: an unknown activation; an input of another rank or size.

    Example:
        >>> norm = convblocks.BatchNormAct2d(64, "relu").eval()
        >>> y = norm(torch.randn(2, 64, 56, 56), residual=torch.randn(2, 64, 56, 56))
    """

    def __init__(
        self,
        num_features: int,
        activation: Layer = "none",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        negative_slope: float = 0.01,
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation_name = function_name("BatchNormAct2d", "activation", activation, ACTIVATIONS)
        self.negative_slope, self.inplace = negative_slope, inplace

    @property
    def function(self) -> str | None:
        """The activation's name in ``convblocks.ops``; None for one with another slope than it has there."""
        other = self.activation_name == "leaky_relu" and self.negative_slope != 0.01
        return None if other else self.activation_name

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # a name in a graph: this stays a module there, as torch's norms do
            args = (x,) if residual is None else (x, residual)
            name = x.tracer.path_of_module(self)
            traced: Tensor = x.tracer.create_proxy("call_module", name, args, {})
            return traced
        mixed = residual is not None and residual.dtype != x.dtype  # by autocast
        if self.training or self.running_mean is None or mixed or backends.selected == "reference":
            return self.end(super().forward(x), residual)
        self._check_input_dim(x)
        scale, shift = scale_shift(self)
        fused = "none" if self.function is None else self.function
        run = operator.run_inplace if self.inplace and _may_be_written(x) else operator
        y = run(x, scale, shift, residual, fused)
        return y if fused == self.activation_name else self.end(y)

    def end(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """What follows the norm, given its output, which may be written over."""
        y = y if residual is None else y + residual
        name = self.activation_name
        if name == "leaky_relu":
            return F.leaky_relu(y, self.negative_slope, inplace=self.negative_slope >= 0)
        return INPLACE.get(name, ACTIVATIONS[name])(y)

    def extra_repr(self) -> str:
        words: str = nn.BatchNorm2d.extra_repr(self)
        slope = f", negative_slope={self.negative_slope}" if self.activation_name == "leaky_relu" else ""
        return f"{words}, activation={self.activation_name}{slope}"
