"""Compiles Triton kernels for GPUs that are not there: their launches are captured, specialised for the real arguments,
and compiled instead of run."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
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
    name: str
    arch: int
    tensors: list[Tensor]
    cubin: bytes

    def code(self) -> sass.Code:
        folder = BUILD / "cubin"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.name}-{hashlib.sha256(self.cubin).hexdigest()[:16]}.cubin"
        if not file.exists():
            file.write_bytes(self.cubin)
        (code,) = sass.read(file)
        return code


@contextlib.contextmanager
def captured(arch: int) -> Iterator[list[Launch]]:
    """Inside, launches of kernels on CPU tensors compile for ``arch`` and are listed; an autotuned kernel compiles in
    all its configurations."""
    launches: list[Launch] = []
    run = JITFunction.run
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        launches.append(Launch(kernel.metadata.name, arch, tensors, kernel.asm["cubin"]))
        return kernel

    def compile_all(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return self.warmup(*args, grid=grid, **kwargs)

    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(arch)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", compile_all),
    ):
        yield launches
