"""CUDA kernels on the CPU: builds .cu files with g++ into one shared object, and talks to the runtime inside it.

Variants of the build, each with the faults that it finds:

plain   divergent barriers, warp operations and shuffles that CUDA leaves undefined, launches beyond the limits
asan    the same; out-of-bounds access (exact allocations), misaligned vectors, undefined behaviour. It ends the process
        at the first fault and loads only into one that preloads ``sanitizers()``
memory  the same; races by CUDA's rules, access outside the exact elements of every tensor, misaligned access, stores to
        inputs; counts the bytes moved

``python -m tests.gpu.emulator [variant]`` builds csrc/cuda and prints the path of the shared object.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tests.gpu.traffic import Traffic, elements

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "gpu"
KERNELS = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))

_TORCH = Path(torch.__file__).parent
_COMMON = ["-std=c++20", "-fPIC", "-g", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
_COMMON += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-isystem{_TORCH / 'include'}"]
_ASAN = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# memory.cpp stands in for ThreadSanitizer's runtime. The optimiser may keep values in registers, as nvcc does, but not
# split or join the accesses of the source.
_MEMORY = ["-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
_MEMORY += ["-fno-tree-sra", "-fno-store-merging"]
_VARIANTS: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    # flags of the kernels, flags of the runtime, its sources, flags of the link
    "plain": (["-O2"], ["-O2"], ["runtime.cpp"], []),
    "asan": (_ASAN, _ASAN, ["runtime.cpp"], _ASAN),
    "memory": (
        _MEMORY,
        ["-O2"],
        ["runtime.cpp", "memory.cpp", "allocator.cpp"],
        [f"-L{_TORCH / 'lib'}", "-lc10", f"-Wl,-rpath,{_TORCH / 'lib'}"],
    ),
}
VARIANTS = tuple(_VARIANTS)


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def _digest(command: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join([*command, torch.__version__]).encode())
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"missing")
    return digest.hexdigest()[:16]


def _compile(source: Path, flags: Sequence[str], folder: Path) -> Path:
    """The object of a source, compiled again only if the command or a file that it includes has changed."""
    name = f"{source.stem}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
    target, key = folder / f"{name}.o", folder / f"{name}.key"
    command = ["g++", *_COMMON, *flags, "-x", "c++", "-c", str(source)]

    def files() -> list[Path]:
        words = target.with_suffix(".d").read_text().replace("\\\n", " ").split()
        return [Path(w) for w in words[1:]]

    if not (target.exists() and key.exists() and key.read_text() == _digest(command, files())):
        key.unlink(missing_ok=True)
        _run([*command, "-o", str(target), "-MD", "-MF", str(target.with_suffix(".d"))])
        key.write_text(_digest(command, files()))
    return target


def build(variant: str = "plain", sources: Sequence[Path] = KERNELS, name: str = "kernels") -> Path:
    """The shared object of the sources in a variant; ``name`` tells those of different sources apart."""
    kernel_flags, runtime_flags, runtime, link_flags = _VARIANTS[variant]
    folder = BUILD / variant
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        jobs = [(s.resolve(), kernel_flags) for s in sources] + [(HERE / r, runtime_flags) for r in runtime]
        objects = list(pool.map(lambda job: _compile(job[0], job[1], folder), jobs))
        command = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,--no-undefined", *map(str, objects), *link_flags]
        if variant == "asan":
            command.remove("-Wl,--no-undefined")  # the sanitizers are preloaded
        target = folder / f"{name}-{_digest(command, objects)}.so"  # a loaded one is never written over
        if not target.exists():
            for old in folder.glob(f"{name}-*.so"):
                old.unlink()
            _run([*command, "-o", f"{target}.new"])
            os.rename(f"{target}.new", target)
    return target


def sanitizers() -> dict[str, str]:
    """The environment of a process that loads the "asan" variant."""
    libraries = [_run(["g++", f"-print-file-name=lib{n}.so"]).strip() for n in ("asan", "ubsan")]
    options = {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "LD_PRELOAD": ":".join(libraries)}


class Emulator:
    """A shared object that ``build`` made, loaded into this process."""

    def __init__(self, file: Path) -> None:
        self.file, self.variant = file, file.parent.name
        self.library = ctypes.CDLL(str(file))
        self.library.cuda_cpu_reports.restype = ctypes.c_char_p

    def order(self, seed: int) -> None:
        """The order of threads and blocks: 0 forward, 1 backward, else the seed of a random one."""
        self.library.cuda_cpu_order(seed)

    def reports(self) -> str:
        """The faults found since the last call, one a line; empty if there was none."""
        text = self.library.cuda_cpu_reports().decode()
        return re.sub(r"@(0x[0-9a-f]+)", lambda m: self._line(m[1]), text)

    def _line(self, address: str) -> str:
        """The place in the source, with the callers into which it was inlined."""
        frames = _run(["addr2line", "-i", "-e", str(self.file), address]).splitlines()
        lines = [f.split()[0].rsplit("/", 1)[-1] for f in frames]
        return " in ".join(line for line in lines if not line.startswith("cuda_cpu.h"))

    @contextlib.contextmanager
    def watch(self, *inputs: Tensor, outputs: Sequence[Tensor] = ()) -> Iterator[Traffic]:
        """Raises AssertionError with the faults found inside.

        In the "memory" variant kernels may touch the inputs (exactly the elements of each view, and not store to them),
        the outputs, and what torch allocates meanwhile; and the bytes that they move are counted.
        """
        memory = self.variant == "memory"
        self.reports()
        if memory:
            for tensors, writable in ((inputs, 0), (outputs, 1)):
                for t in tensors:
                    mask = elements(t) if t.numel() else torch.empty(0)
                    data, size = ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(len(mask))
                    self.library.cuda_cpu_allow(data, size, ctypes.c_void_p(mask.data_ptr()), writable)
            self.library.cuda_cpu_watch(1)
        traffic = Traffic()
        try:
            yield traffic
        finally:
            if memory:
                counts = (ctypes.c_int64 * 4)()
                self.library.cuda_cpu_traffic(counts)
                traffic.loaded, traffic.stored, traffic.loaded_sectors, traffic.stored_sectors = counts
                self.library.cuda_cpu_watch(0)
            if faults := self.reports():
                raise AssertionError(faults)  # a fault also fails the launch, and so the operation


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "plain"))
