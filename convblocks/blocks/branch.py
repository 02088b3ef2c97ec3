from __future__ import annotations

from torch import Tensor, nn

from convblocks.blocks.batch_norm_act import BatchNormAct2d


class Branch(nn.Sequential):
    """Layers of which the last, a norm or another branch, adds a residual."""

    @property
    def chains(self) -> tuple[tuple[str, str], ...]:
        """The last convolution and its norm."""
        *_, before, last = (None, *self._modules)
        return ((before, last),) if before and isinstance(self[-1], BatchNormAct2d) else ()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        *layers, last = self
        for layer in layers:
            input = layer(input)
        y: Tensor = last(input) if residual is None else last(input, residual)
        return y
