from __future__ import annotations

from torch import Tensor, nn

from convblocks.blocks.arguments import positive
from convblocks.blocks.attention import Attention, attention_layer
from convblocks.blocks.conv_norm_act import ConvNormAct
from convblocks.blocks.drop_path import check_drop_path, drop_path


class DarknetResidual(nn.Module):
    """Darknet-53's block: a 1x1 convolution to half of the channels and a 3x3 one back, round which the input goes.

    ``x + drop_path(conv2(attn(conv1(x))))``, each convolution with its norm and a leaky ReLU, none after the sum.
    Redmon and Farhadi, "YOLOv3: An Incremental Improvement", arXiv 1804.02767. The keys of the state dict are those of
    timm's DarkBlock.

    Args:
        channels: C, even.
        negative_slope: of the leaky ReLUs: 0.1 is the authors', 0.01 timm's.
        attention: between the convolutions: a name ("se", "eca", "cbam", "simam", ...), what makes a module for
            channels, or None.
        drop_path: the probability with which a sample skips the block in training.
        norm_eps: of the norms.

    Shape: (N, C, H, W) to the same.

    Raises:
        ValueError: numbers out of range, an odd number of channels, an unknown attention.

    Example:
        >>> y = convblocks.DarknetResidual(64)(torch.randn(2, 64, 28, 28))
    """

    def __init__(
        self,
        channels: int,
        negative_slope: float = 0.1,
        *,
        attention: Attention = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        name = "DarknetResidual"
        if positive(name, "channels", channels) % 2:
            raise ValueError(f"{name}: expected an even number of channels, got {channels}")
        self.conv1 = ConvNormAct(
            channels, channels // 2, 1, activation="leaky_relu", negative_slope=negative_slope, eps=norm_eps
        )
        self.attn = attention_layer(name, attention, channels // 2)
        self.conv2 = ConvNormAct(
            channels // 2, channels, 3, activation="leaky_relu", negative_slope=negative_slope, eps=norm_eps
        )
        self.drop_path = check_drop_path(name, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = self.conv2(y if self.attn is None else self.attn(y))
        return x + drop_path(y, self.drop_path, self.training)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path}" if self.drop_path else ""
