"""The tiles of the depthwise convolution."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from convblocks.kernels.maps import ENOUGH, SECTOR, Maps, power_of_2

FORWARD_ELEMENTS = 4096  # of a tile
BACKWARD_ELEMENTS = 2048  # in channels_last twice as many: its tiles are narrow, as channels share sectors
LEAST_ELEMENTS = 2048  # of one that is smaller to keep a GPU busy
MOST_ELEMENTS = 16384  # of one whose margin needs so many


class _Side(NamedTuple):
    """One side of the maps."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    padding: int

    def windows(self, block: int, margin: bool, vector: int) -> tuple[int, int] | None:
        """Of a backward program: it has ``block`` windows, from ``program * step + first`` on, of which ``step`` are
        its own and the others in its margin; and the gradients of ``step * stride`` pixels. None: the margin is too
        large."""
        if not margin:
            return 0, block
        if block >= self.out:
            return 0, max(block, -(-self.size // self.stride))
        reach = (self.kernel - 1) * self.dilation - self.padding
        first = min(0, -(reach // self.stride)) // vector * vector  # not above the first window that has pixel 0
        last = (self.stride - 1 + self.padding) // self.stride  # windows past its own that have its last pixel
        step = (block + first - last) // vector * vector
        return (first, step) if step > 0 else None


class _Blocks(NamedTuple):
    """What a backward program has of a sample: of rows and of columns; how many there are of each."""

    first: tuple[int, int]
    step: tuple[int, int]
    block: tuple[int, int]
    pixels: tuple[int, int]
    counts: tuple[int, int]


@functools.lru_cache(maxsize=4096)
def _backward_blocks(sides: tuple[_Side, _Side], margin: bool, channels: int, vector: int, most: int) -> _Blocks | None:
    """Those with the least to load and to compute, for tiles of at least so many channels, and if possible of at most
    ``most`` elements; None where none fits."""
    best: tuple[tuple[int, int], _Blocks] | None = None
    for block in itertools.product(*([1 << i for i in range(power_of_2(s.out).bit_length())] for s in sides)):
        windows = [s.windows(b, margin, v) for s, b, v in zip(sides, block, (1, vector), strict=True)]
        (rows, columns) = windows
        if rows is None or columns is None:
            continue
        (first, step) = zip(rows, columns, strict=True)
        pixels = [power_of_2(max(1, min(n * s.stride, s.size))) for n, s in zip(step, sides, strict=True)]
        counts = [max(-(-s.out // n), -(-s.size // (n * s.stride))) for n, s in zip(step, sides, strict=True)]
        loaded = [min(s.size, b * s.stride + (s.kernel - 1) * s.dilation) for b, s in zip(block, sides, strict=True)]
        elements = max(math.prod(block), math.prod(pixels))
        excess = max(0, elements * channels - most)
        cost = (excess, math.prod(counts) * (elements + 4 * math.prod(loaded)))
        if elements * channels <= MOST_ELEMENTS and (best is None or cost < best[0]):
            best = cost, _Blocks(first, step, block, (pixels[0], pixels[1]), (counts[0], counts[1]))
    return None if best is None else best[1]


class Tiling(NamedTuple):
    grid: int
    blocks: tuple[int, int, int]  # of channels, rows and columns
    shares: int  # programs that have the same channels
    constants: dict[str, Any]


class Convolution:
    """A call: its maps and parameters, what the kernels know of them when compiled, and the tiles."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self.maps = Maps(x)
        self.weight, self.bias = weight.contiguous(), None if bias is None else bias.contiguous()
        self.channels, _, kh, kw = weight.shape
        left, right, top, bottom = padding

        def side(i: int, k: int, before: int, after: int) -> _Side:
            size, reach = x.shape[2 + i], (k - 1) * dilation[i] + 1
            return _Side(size, (size + before + after - reach) // stride[i] + 1, k, stride[i], dilation[i], before)

        self.sides = side(0, kh, top, bottom), side(1, kw, left, right)
        self.planes = not self.maps.channels_last
        rows, columns = self.sides
        self.vector = math.gcd(self.maps.vector, *((columns.size, columns.out) if self.planes else (self.channels,)))
        self.sizes = (self.maps.n, self.channels, rows.size, columns.size, rows.out, columns.out)
        self.constants = {
            "MULTIPLIER": self.channels // self.maps.c,
            "KH": kh,
            "KW": kw,
            "SH": rows.stride,
            "SW": columns.stride,
            "DH": rows.dilation,
            "DW": columns.dilation,
            "TOP": top,
            "LEFT": left,
            "CHANNELS_LAST": self.maps.channels_last,
        }

    def empty(self) -> Tensor:
        x = self.maps.arguments[0]
        size = (self.maps.n, self.channels, self.sides[0].out, self.sides[1].out)
        return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=self.maps.format)

    def gradient(self, grad: Tensor) -> tuple[list[Any], int]:
        """The arguments for it, and the vectors that all maps allow."""
        maps = Maps(grad, channels_last=self.maps.channels_last)
        return maps.arguments, math.gcd(self.vector, maps.vector)

    @property
    def narrow(self) -> int:
        """The channels that share a sector."""
        return 1 if self.planes else SECTOR // self.maps.itemsize

    def _tiling(self, channels: int, pixels: int, counts: tuple[int, int], elements: int, **blocks: int) -> Tiling:
        """Samples and channels for so many pixels of each."""
        h, w = counts
        most = max(1, elements // pixels)
        block = 1 if self.planes else min(power_of_2(channels), max(self.narrow, most))
        samples = min(power_of_2(self.maps.n), max(1, most // block), 8)  # first: their shares are one
        if self.planes:
            block = min(power_of_2(channels), max(1, most // samples))

        def too_few() -> bool:
            programs = triton.cdiv(self.maps.n, samples) * triton.cdiv(channels, block) * h * w
            return samples * block * pixels > LEAST_ELEMENTS and programs < ENOUGH

        while samples > 1 and too_few():
            samples //= 2
        while block > self.narrow and too_few():
            block //= 2
        n, c = triton.cdiv(self.maps.n, samples), triton.cdiv(channels, block)
        warps = max(1, min(16, samples * block * pixels // 256))
        # All registers that there are: else the assembler may spill some, for more programs at a time.
        launch = {"num_warps": warps, "maxnreg": min(255, 2048 // warps)}
        constants = {**self.constants, **blocks, "BLOCK_N": samples, "BLOCK_C": block, **launch}
        return Tiling(n * c * h * w, (c, h, w), n * h * w, constants)

    def forward_tiling(self) -> Tiling:
        rows, columns = self.sides
        most = FORWARD_ELEMENTS // min(power_of_2(self.channels), 1 if self.planes else 4 * self.narrow)
        w = min(power_of_2(columns.out), 128 if self.planes else 16)
        h = min(power_of_2(rows.out), most // w)
        counts = triton.cdiv(rows.out, h), triton.cdiv(columns.out, w)
        return self._tiling(self.channels, h * w, counts, FORWARD_ELEMENTS, BLOCK_H=h, BLOCK_W=w)

    def backward_tiling(self, activation: str) -> Tiling | None:
        """None where the margin is too large for any tile."""
        channels, vector = min(power_of_2(self.maps.c), self.narrow), self.vector if self.planes else 1
        elements = BACKWARD_ELEMENTS if self.planes else 2 * BACKWARD_ELEMENTS
        b = _backward_blocks(self.sides, activation != "none", channels, vector, elements)
        if b is None:
            return None
        names = ("FIRST", "STEP", "BLOCK", "PIXELS")
        blocks = {
            f"{name}_{side}": pair[i] for name, pair in zip(names, b, strict=False) for i, side in enumerate("HW")
        }
        pixels = max(math.prod(b.block), math.prod(b.pixels))
        return self._tiling(self.maps.c, pixels, b.counts, elements, **blocks)
