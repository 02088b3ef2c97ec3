"""Reads machine code of NVIDIA GPUs: the width of loads and stores, and spilled registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Code:
    """One kernel for one architecture. Loads and stores of global memory are counted by their width in bytes."""

    arch: int
    name: str
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    local: int = 0  # accesses of local memory: spilled registers, or arrays that did not fit into registers

    def add(self, instruction: str) -> None:
        operation, *modifiers = instruction.split(".")
        if operation in ("LDL", "STL"):
            self.local += 1
        elif operation in ("LDG", "LD", "LDGSTS"):
            self.loads[_width(modifiers)] += 1
        elif operation in ("STG", "ST"):
            self.stores[_width(modifiers)] += 1


def _width(modifiers: list[str]) -> int:
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[m] for m in modifiers if m in widths), 4)


def disassembler() -> str | None:
    """cuobjdump: of the CUDA toolkit, or the one in triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = [Path(p) / "backends/nvidia/bin/cuobjdump" for p in (triton and triton.submodule_search_locations) or []]
    return next((str(p) for p in bundled if p.exists()), None) or shutil.which("cuobjdump")


_LINE = re.compile(
    r"code for sm_(?P<arch>\d+)|Function : (?P<name>\S+)|"
    r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<instruction>[A-Z][\w.]*)"
)


def read(file: Path) -> list[Code]:
    """The kernels in a cubin, an object or a shared object."""
    tool = disassembler()
    assert tool is not None
    listing = subprocess.run([tool, "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    kernels: list[Code] = []
    arch = 0
    for match in _LINE.finditer(listing):
        if match["arch"]:
            arch = int(match["arch"])
        elif match["name"]:
            kernels.append(Code(arch, match["name"]))
        else:
            kernels[-1].add(match["instruction"])
    return kernels
