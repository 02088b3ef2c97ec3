"""What both checkers say about memory: bytes moved, and which bytes are the elements of a view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SECTOR = 32  # bytes: what a GPU fetches at least
CACHED_SECTORS = 512  # 16 KiB: what one of the programs that share a multiprocessor can count on in its first cache


@dataclass
class Traffic:
    """Bytes that kernels loaded and stored: as asked by each thread or lane, and in whole 32-byte sectors.

    A sector counts once for each pass over it: once in what a CUDA block accesses between two barriers or warp
    operations, once in each load or store of a Triton program. But what a Triton program loads again is not fetched
    again while it is among the ``CACHED_SECTORS`` sectors that this program loaded last: the compiler puts barriers
    where it wants, so that there are no passes to count, and code for shifted pixels can only load them again. Nothing
    else is taken from a cache: neither what another program or launch loaded, nor what was stored.
    """

    loaded: int = 0
    stored: int = 0
    loaded_sectors: int = 0
    stored_sectors: int = 0

    @property
    def moved(self) -> int:
        """Bytes in whole sectors, both ways."""
        return SECTOR * (self.loaded_sectors + self.stored_sectors)


def extent(t: Tensor) -> int:
    """From the first to the last element of a view, in elements."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def elements(t: Tensor) -> Tensor:
    """Of the bytes from the first to the last element of a view: which belong to its elements (gaps do not)."""
    mask = torch.zeros(extent(t), dtype=torch.bool)
    mask.as_strided(t.shape, t.stride()).fill_(True)
    return mask.repeat_interleave(t.element_size())
