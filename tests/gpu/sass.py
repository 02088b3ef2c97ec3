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


def tool() -> str | None:
    """cuobjdump: the one in triton's wheel, or that of the CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    bundled = [Path(p) / "backends/nvidia/bin/cuobjdump" for p in (triton and triton.submodule_search_locations) or []]
    return next((str(p) for p in bundled if p.exists()), None) or shutil.which("cuobjdump")


def _dump(option: str, file: Path) -> str:
    command = tool()
    assert command is not None
    return subprocess.run([command, option, str(file)], capture_output=True, text=True, check=True).stdout


_LINE = re.compile(
    r"code for sm_(?P<arch>\d+)|Function : (?P<name>\S+)|"
    r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(?P<instruction>[A-Z][\w.]*)"
)


def read(file: Path) -> list[Code]:
    """The kernels in a cubin, an object or a shared object. Takes half a second, and more for many kernels."""
    kernels: list[Code] = []
    arch = 0
    for match in _LINE.finditer(_dump("-sass", file)):
        if match["arch"]:
            arch = int(match["arch"])
        elif match["name"]:
            kernels.append(Code(arch, match["name"]))
        else:
            kernels[-1].add(match["instruction"])
    return kernels


def local_bytes(file: Path) -> dict[tuple[int, str], int]:
    """By architecture and kernel: the bytes of local memory of a thread, where spilled registers lie. Quick.

    The architecture of a cubin is not named and is 0 here.
    """
    found: dict[tuple[int, str], int] = {}
    arch = 0
    for match in _USAGE.finditer(_dump("-res-usage", file)):
        if match["arch"]:
            arch = int(match["arch"])
        else:
            found[arch, match["name"]] = int(match["stack"]) + int(match["local"])
    return found


_USAGE = re.compile(
    r"arch = sm_(?P<arch>\d+)|"
    r"Function (?P<name>\S+):\s+REG:\d+ STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)"
)
