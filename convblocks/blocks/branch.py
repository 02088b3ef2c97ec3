from __future__ import annotations

from torch import Tensor, nn

from convblocks.blocks.batch_norm_act import BatchNormAct2d
from convblocks.blocks.fused import run_layers


class Branch(nn.Sequential):
    """Layers of which the last, a norm or another branch, adds a residual."""

    @property
    def chains(self) -> tuple[tuple[str, str], ...]:
        """The last convolution and its norm."""
        *_, before, last = (None, *self._modules)
        return ((before, last),) if before and isinstance(self[-1], BatchNormAct2d) else ()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = run_layers(self, input, residual)
        return y
