"""How the kernels see a feature map: by strides, in tiles of channels x pixels.

One kernel source serves both layouts. In NCHW the pixels of a plane lie dense and the stride between channels is free;
in channels_last the channels of a pixel lie dense and the stride between pixels is free. Triton vectorises a tile along
the dense direction, as wide as it can see that sizes and strides divide: ``VEC`` (a compile-time number that divides
them all) and ``aligned`` tell it so.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sizes and strides are not specialised by value: VEC says what matters, and many sizes share few kernels.
kernel = functools.partial(
    triton.jit,
    do_not_specialize=(
        *("N", "C", "HW", "K", "M", "x_batch", "x_stride", "g_batch", "g_stride", "y_batch", "y_stride"),
        *("r_batch", "r_stride"),
        *("blocks", "chunk", "count", "first", "width", "apart"),
        *("H", "W", "OH", "OW", "c_blocks", "h_blocks", "w_blocks"),
        *("groups", "y_plane", "y_pixel", "g_plane", "g_pixel"),
    ),
)

SECTOR = 32  # bytes: what a GPU fetches at least
LINE = 128  # bytes: what a warp fetches best
ENOUGH = 512  # programs that keep any GPU busy


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def is_channels_last(x: Tensor) -> bool:
    """What ``memory_format`` says in csrc/op.cpp."""
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return True
    (n, c, h, w), (sn, sc, sh, sw) = x.shape, x.stride()
    if sc == 0 or 0 in (n, c, h, w):
        return False
    return sw >= sc * c and sh >= sw * w and sn >= sh * h != sc


class Tile(NamedTuple):
    """Channels x pixels of one program, how many tiles cover a sample, and the kernel's compile-time arguments."""

    c_blocks: int
    p_blocks: int
    constants: dict[str, Any]


class Maps:
    """Maps of one shape, dtype and layout: the arguments that the kernels take, and the tiles they are cut into."""

    def __init__(self, x: Tensor, *others: Tensor, channels_last: bool | None = None) -> None:
        """In the format of x, or in another one that a call's maps of other sizes have."""
        self.n, self.c, h, w = x.shape
        self.hw = h * w
        self.channels_last = is_channels_last(x) if channels_last is None else channels_last
        self.format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.dtype, self.itemsize = x.dtype, x.element_size()
        self.accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.vector = math.gcd(16 // self.itemsize, self.c if self.channels_last else self.hw)
        self.arguments: list[Any] = []  # data, batch stride, stride of each map
        for t in (x, *others):
            self._add(t, h, w)

    def _add(self, t: Tensor, h: int, w: int) -> None:
        """Any strides fit whose free directions are the batch and one other; the rest is copied."""
        sn, sc, sh, sw = t.stride()
        pixel = sw if w > 1 else sh
        even = h == 1 or w == 1 or sh == w * sw
        if not (even and (sc == 1 or self.c == 1 if self.channels_last else pixel == 1 or self.hw == 1)):
            t = t.contiguous(memory_format=self.format)
            sn, sc, sh, sw = t.stride()
            pixel = sw if w > 1 else sh
        batch, stride = (sn if self.n > 1 else 0), (pixel if self.channels_last else sc)
        self.vector = math.gcd(self.vector, batch, stride)
        self.arguments += (t, batch, stride)

    def pair(self) -> tuple[Any, ...]:
        """The arguments of a kernel that takes one map, or two: for the second one then None."""
        return (*self.arguments, *((None, 0, 0) if len(self.arguments) == 3 else ()))

    def output(self) -> Tensor:
        return torch.empty_like(self.arguments[0], memory_format=self.format)

    def read_bytes(self, channels: int) -> int:
        """Of planes of so many channels, of all maps."""
        return channels * self.hw * self.itemsize * (len(self.arguments) // 3)

    def sums(self, *size: int) -> Tensor:
        """Memory for sums, uninitialised."""
        x: Tensor = self.arguments[0]
        return torch.empty(size, dtype=self.accumulator, device=x.device)

    def tile(self, elements: int, a_thread: int = 16) -> Tile:
        """Tiles of at most ``elements``, fewer where the map has too few of those to keep a GPU busy."""
        c, p = power_of_2(self.c), power_of_2(self.hw)
        if self.channels_last:
            block_c = min(c, max(LINE // self.itemsize, elements // p))
            block_p = min(p, max(1, elements // block_c))
        else:
            block_p = min(p, elements)
            block_c = min(c, elements // block_p)
        while block_c * block_p > 2048 and self.programs(block_c, block_p) < ENOUGH:
            if block_c > 1 and (block_p == 1 or not self.channels_last):
                block_c //= 2
            else:
                block_p //= 2
        return self.tile_of(block_c, block_p, a_thread)

    def programs(self, block_c: int, block_p: int) -> int:
        return self.n * triton.cdiv(self.c, block_c) * triton.cdiv(self.hw, block_p)

    def tile_of(self, block_c: int, block_p: int, a_thread: int = 16) -> Tile:
        """With so many elements for each thread; fewer where each needs an address of its own."""
        a_thread = a_thread if self.vector > 1 else 8
        constants = {
            "VEC": self.vector,
            "CHANNELS_LAST": self.channels_last,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "num_warps": max(1, min(16, block_c * block_p // (32 * a_thread))),
        }
        return Tile(triton.cdiv(self.c, block_c), triton.cdiv(self.hw, block_p), constants)


@triton.jit
def aligned(size, VEC: tl.constexpr):
    """``size``, known by the compiler to be a multiple of VEC."""
    return size // VEC * VEC


@triton.jit
def locate(program, C, blocks, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, channels (a column) and block of pixels, one of ``blocks``. Neighbours in memory run at the same time."""
    c_blocks = tl.cdiv(C, BLOCK_C)
    if CHANNELS_LAST:
        c_block = program % c_blocks
        rest = program // c_blocks
        p_block = rest % blocks
        n = rest // blocks
    else:
        p_block = program % blocks
        rest = program // blocks
        c_block = rest % c_blocks
        n = rest // c_blocks
    c = c_block * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    return n.to(tl.int64), c, p_block.to(tl.int64)


@triton.jit
def backwards():
    """The number of this program from the end: the cache still holds the end of what the launch before has read."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def inside(c, p, C, HW, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Which of channels c x pixels p are in the map."""
    if CHANNELS_LAST:
        return (c < aligned(C, VEC)) & (p < HW)
    else:
        return (c < C) & (p < aligned(HW, VEC))


@triton.jit
def offsets(n, c, p, batch, stride, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where sample n, channels c x pixels p lie in a map with these strides."""
    start = n * aligned(batch.to(tl.int64), VEC)
    stride = aligned(stride.to(tl.int64), VEC)
    if CHANNELS_LAST:
        return start + p * stride + c
    else:
        return start + c * stride + p


@triton.jit
def dense_offsets(n, c, p, C, HW, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where they lie in an output."""
    if CHANNELS_LAST:
        return offsets(n, c, p, C.to(tl.int64) * HW, C, VEC, CHANNELS_LAST)
    else:
        return offsets(n, c, p, C.to(tl.int64) * HW, HW, VEC, CHANNELS_LAST)


@triton.jit
def widen(value):
    """Half precision is for storage only: everything is computed in float32, or float64."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def load(pointer, mask):
    """Zeros where masked off."""
    return widen(tl.load(pointer, mask=mask, other=0.0))


@triton.jit
def store(pointer, value, mask):
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
