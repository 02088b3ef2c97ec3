"""Compiles Triton kernels for GPUs that are not there: their launches are captured, specialised for the real arguments,
and compiled instead of run."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from tests.gpu import sass
from tests.gpu.emulator import BUILD

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


class _Driver:
    """What triton asks a driver while it compiles. A device of each architecture, as kernels are cached by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass
class Launch:
    """A launch that was compiled instead of run."""

    name: str
    arch: int
    tensors: list[Tensor]
    ptx: str
    cubin: bytes

    def widths(self) -> sass.Code:
        """Its loads and stores in PTX, which become one machine instruction each."""
        code = sass.Code(self.arch, self.name)
        for kind, vector, bits in _ACCESS.findall(self.ptx):
            (code.loads if kind == "ld" else code.stores)[int(vector or 1) * int(bits) // 8] += 1
        return code

    def file(self) -> Path:
        folder = BUILD / "cubin"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}-{hashlib.sha256(self.cubin).hexdigest()[:16]}.cubin"
        file.write_bytes(self.cubin)
        return file


_ACCESS = re.compile(r"\b(ld|st)\.global[.:\w]*?(?:\.v(\d))?\.[bfsu](\d+)\b")


@contextlib.contextmanager
def captured(arch: int) -> Iterator[list[Launch]]:
    """Inside, launches of kernels on CPU tensors compile for ``arch`` and are listed; an autotuned kernel compiles in
    all its configurations."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        launches.append(Launch(kernel.metadata.name, arch, tensors, kernel.asm["ptx"], kernel.asm["cubin"]))
        return kernel

    def compile_all(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return self.warmup(*args, grid=grid, **kwargs)

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", compile_all),
    ):
        yield launches
