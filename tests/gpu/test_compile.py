"""The GPU kernels of every operation compile for every architecture without spilled registers, and move 16 bytes at a
time where the layout of the map allows. No GPU is needed."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import importlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from convblocks import backends
from convblocks.opinfo import OPS, OpInfo, Options, Size
from tests.gpu import sass
from tests.gpu.emulator import BUILD, KERNELS, ROOT
from tests.ops.common import backward_operands, dtype_pairs, each_option, operands

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from tests.gpu.triton_compile import ARCHITECTURES, Launch, captured  # noqa: E402

# --- the reading of machine code itself -------------------------------------------------------------------------------


@triton.jit
def copy(x, y, n, block: tl.constexpr):
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def centre(x, y, block: tl.constexpr):
    i = tl.arange(0, block)
    values = tl.load(x + i)
    tl.store(y + i, values - tl.sum(values, 0) / block)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_widths_are_read(arch: int) -> None:
    x, y = torch.empty(4096), torch.empty(4096)
    with captured(arch) as launches:
        copy[(1,)](x, y, 4096, block=1024)
        copy[(1,)](x, y, 4001, block=1024)  # the end of the mask is not a multiple of 16
        copy[(1,)](x[1:], y, 4096, block=1024)
        copy[(1,)](x.bfloat16()[1:], y.bfloat16(), 4096, block=1024)
    expected = [((16, 2), (16, 2)), ((4, 8), (4, 8)), ((4, 8), (16, 2)), ((2, 8), (16, 1))]
    for launch, (loads, stores) in zip(launches, expected, strict=True):
        assert (launch.widths().loads, launch.widths().stores) == (dict([loads]), dict([stores]))
    (code,) = sass.read(launches[2].file())
    assert code == launches[2].widths()
    (local,) = sass.local_bytes(launches[2].file()).values()
    assert local == 0


def test_spilled_registers_are_found() -> None:
    x = torch.empty(4096)
    with captured(90) as launches:
        centre[(1,)](x, x, block=4096, num_warps=1, maxnreg=64)
    (local,) = sass.local_bytes(launches[0].file()).values()
    assert local > 0
    (code,) = sass.read(launches[0].file())
    assert code.local > 0


def test_autotuned_kernels_compile_in_every_configuration() -> None:
    configurations = [triton.Config({"block": 256}), triton.Config({"block": 1024})]
    tuned = triton.autotune(configurations, key=["n"])(copy)
    with captured(90) as launches:
        tuned[(1,)](torch.empty(1024), torch.empty(1024), 1024)
    assert len(launches) == 2


# --- Triton -----------------------------------------------------------------------------------------------------------

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
LAYOUTS = ("contiguous", "channels_last")
ALIGNED, ODD = (8, 64, 56, 56), (2, 95, 7, 7)


@dataclass(frozen=True)
class Case:
    arch: int
    options: Options
    dtypes: tuple[torch.dtype, torch.dtype]
    layout: str
    size: Size

    def __str__(self) -> str:
        words = (f"sm_{self.arch}", *self.dtypes, self.layout, self.size[2])
        return "-".join(str(w).removeprefix("torch.") for w in words)


def _some_cases(info: OpInfo) -> Iterator[Case]:
    """All of these for one architecture; for each of the others one."""
    others = [arch for arch in ARCHITECTURES if arch != 90]
    for i, (dtypes, layout, size) in enumerate(itertools.product(DTYPES, LAYOUTS, (ALIGNED, ODD))):
        for arch in (90, *others[i : i + 1]):
            yield Case(arch, info.bench[0], dtypes, layout, size)


@pytest.mark.parametrize(
    ("info", "case"), [pytest.param(info, c, id=f"{info.name}-{c}") for info in OPS.values() for c in _some_cases(info)]
)
def test_triton(info: OpInfo, case: Case) -> None:
    _check(info, case)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@each_option
def test_triton_in_full(info: OpInfo, options: Options, arch: int) -> None:
    sizes = (ALIGNED, ODD, (2, 32, 112, 112))
    for dtypes, layout, size in itertools.product(dtype_pairs(info), (*LAYOUTS, "crop"), sizes):
        _check(info, Case(arch, options, dtypes, layout, size))


@pytest.mark.parametrize("case", _some_cases(OPS["depthwise_conv2d"]), ids=str)
def test_triton_with_sums(case: Case) -> None:
    info = OPS["depthwise_conv2d"]
    dtype, parameter_dtype = case.dtypes
    sample = info.sample(case.size, case.options, dtype=dtype, parameter_dtype=parameter_dtype, layout=case.layout)
    function = importlib.import_module("convblocks.kernels.depthwise_conv2d").depthwise_conv2d_sums
    _compiled(function, operands(info, sample), case)


def _compiled(function: Callable[..., Any], inputs: Sequence[Any], case: Case) -> list[Launch]:
    """What the function launches: each kernel compiled, without spills."""
    with captured(case.arch) as launches:
        function(*inputs)
    assert launches
    for launch in launches:
        (local,) = sass.local_bytes(launch.file()).values()
        assert local == 0, f"{case}: {function.__name__}: {launch.name} spills {local} bytes a thread"
    return launches


def _check(info: OpInfo, case: Case) -> None:
    dtype, parameter_dtype = case.dtypes
    module = importlib.import_module(f"convblocks.kernels.{info.name}")
    sample = info.sample(case.size, case.options, dtype=dtype, parameter_dtype=parameter_dtype, layout=case.layout)
    arguments, grad = operands(info, sample), info.gradient(sample, case.layout)
    backward = backward_operands(info, sample, grad)
    for name, inputs in ((info.name, arguments), (f"{info.name}_backward", backward)):
        launches = _compiled(getattr(module, name), inputs, case)
        vectors = case.layout != "channels_last" or all(t.shape[1] * dtype.itemsize % 16 == 0 for t in sample.maps)
        if vectors and case.size == ALIGNED and case.layout in LAYOUTS and dtype.itemsize < 8:
            is_map = 8 * grad.numel() >= sample.x.numel()  # or a number for each plane or pixel
            maps = {t.data_ptr() for t in (*sample.maps, *([grad] if is_map else []))}
            writes_map = "backward" in name or is_map
            disassemble = case.arch == 90 and dtype == torch.float32
            _check_widths(name, launches, maps, writes_map, disassemble)


def _check_widths(name: str, launches: list[Launch], maps: set[int], writes_map: bool, disassemble: bool) -> None:
    """Each kernel loads the maps that it is given 16 bytes or more at a time, and one stores so what is a map."""

    def wide(widths: dict[int, int]) -> int:
        return sum(count for width, count in widths.items() if width >= 16)

    stores = 0
    for launch in launches:
        given = len({t.data_ptr() for t in launch.tensors} & maps)
        for code in [launch.widths(), *(sass.read(launch.file()) if disassemble else [])]:
            assert wide(code.loads) >= given, f"{name}: {launch.name} loads {given} maps, {code}"
            stores += wide(code.stores)
    assert stores > 0 or not writes_map, f"{name}: no store of 16 bytes: {[launch.widths() for launch in launches]}"


# --- CUDA -------------------------------------------------------------------------------------------------------------


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or next(iter(sorted(map(str, Path("/usr/local").glob("cuda-*")))), "")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _asked() -> set[int]:
    """The architectures that the build was for: all, if it was not told."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        return set(ARCHITECTURES)
    names: Any = backends.build_record()["cuda_architectures"]
    return {int(re.sub(r"\D", "", name)) for name in names}


@pytest.fixture(scope="module")
def cuda_objects() -> list[Path]:
    """The CUDA kernels as setup.py built them; where it did not, or they changed since, they are compiled here."""
    if sass.tool() is None:
        pytest.skip("cuobjdump was not found (it comes with triton and with the CUDA toolkit)")
    built = backends._shared_object("_cuda")
    sources = [*KERNELS, *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    is_new = built.exists() and built.stat().st_mtime > max(s.stat().st_mtime for s in sources)
    if is_new and {arch for arch, _ in sass.local_bytes(built)} >= _asked():
        return [built]
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("the CUDA kernels are not built and nvcc was not found (put it on PATH or set CUDA_HOME)")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    command = [nvcc, "-std=c++20", "-O3", "-c", "-Xptxas", "-warn-spills,-Werror"]
    command += [f"-I{Path(torch.__file__).parent / 'include'}"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES if f"compute_{a}" in known]
    folder = BUILD / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [[*command, str(s), "-o", str(folder / f"{s.stem}.o")] for s in KERNELS]
        for done in pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs):
            assert done.returncode == 0, done.stdout + done.stderr
    return [folder / f"{s.stem}.o" for s in KERNELS]


def test_cuda(cuda_objects: list[Path]) -> None:
    callers = {s.stem for s in KERNELS if "__global__" not in s.read_text()}  # of the kernels of other files
    for file in cuda_objects:
        usage = sass.local_bytes(file)
        assert bool(usage) == (file.stem not in callers), file.name
        local = {kernel: size for kernel, size in usage.items() if size}
        assert not local, f"{file.name}: {local}"
