"""Builds the compiled part: _C, the CPU kernels once per instruction set, and the CUDA kernels.

They are plain shared objects (no Python API), so one wheel serves every Python version. What cannot be built is left
out, and the reason goes into convblocks/_build_info.json, which ``python -m convblocks info`` shows. Variables:

    CONVBLOCKS_BUILD=0            build nothing
    CONVBLOCKS_REQUIRE_EXT=1      a part that fails to build fails the installation
    CONVBLOCKS_CUDA=0|1           never build the CUDA kernels | fail without them
    CONVBLOCKS_DEBUG=1            no optimisation, debug symbols, assertions
    CONVBLOCKS_SANITIZE=address,undefined
    CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS    as for torch's own extensions
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import setuptools
from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(f"convblocks: expected setuptools >= 77, got {setuptools.__version__} (pip install -U setuptools)")

from setuptools.command.bdist_wheel import bdist_wheel  # not in older ones

fcntl = None
with contextlib.suppress(ImportError):  # not on Windows
    import fcntl

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LINUX = sys.platform == "linux"
ISAS = {"default": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *ISAS["avx2"]]
    ISAS["avx512"] += ["-Wno-uninitialized"]  # GCC 12's own intrinsics (bug 105593)
PARTS = ["_C", *(f"_cpu_{isa}" for isa in ISAS), "_cuda"]
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0 12.0+PTX"


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


DEBUG = enabled("CONVBLOCKS_DEBUG")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


class Unavailable(Exception):
    """A part cannot be built here; says why."""


@dataclass
class Torch:
    folder: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        """The torch that will run the package: read, not imported, as pip's build isolation hides it from imports."""
        for place in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
            folder = Path(place) / "torch"
            if (folder / "version.py").is_file() and (folder / "include").is_dir():
                facts = runpy.run_path(str(folder / "version.py"))
                return cls(folder, facts["__version__"], facts["cuda"])
        raise Unavailable("torch is not installed where the build runs (install it first, or use --no-build-isolation)")

    def compile_flags(self) -> list[str]:
        config = self.folder / "share/cmake/Torch/TorchConfig.cmake"
        abi = re.search(r"-D_GLIBCXX_USE_CXX11_ABI=\d", config.read_text()) if config.is_file() else None
        return ["-fopenmp", *([abi[0]] if abi else [])]

    def include_flags(self) -> list[str]:
        include = self.folder / "include"
        return [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]

    def link_flags(self) -> list[str]:
        """Libraries, with the OpenMP runtime that torch itself loads: a second one would mean a second thread pool."""
        lib = self.folder / "lib"
        bundled = [*lib.glob("libgomp*.so*"), *self.folder.parent.glob("torch.libs/libgomp*.so*")]
        return [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", str(bundled[0]) if bundled else "-fopenmp"]


def find_nvcc(torch: Torch) -> tuple[str, str]:
    """nvcc and its version; the first whose CUDA is not newer than torch's, as the driver may know no newer one."""
    if torch.cuda is None:
        raise Unavailable(f"torch {torch.version} is built without CUDA")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home) / "bin/nvcc" for home in homes if home]
    candidates += [Path(found) for found in (shutil.which("nvcc"),) if found]
    candidates += [Path("/usr/local/cuda/bin/nvcc"), *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"), reverse=True)]
    too_new = []
    for nvcc in candidates:
        version = re.search(r"release .*V(\S+)", output_of(str(nvcc), "--version"))
        if version is None:
            continue
        if int(version[1].split(".")[0]) <= int(torch.cuda.split(".")[0]) or os.environ.get("CONVBLOCKS_CUDA") == "1":
            return str(nvcc), version[1]
        too_new.append(version[1])
    if too_new:
        raise Unavailable(f"nvcc {too_new[0]} is newer than the CUDA {torch.cuda} of torch {torch.version}")
    raise Unavailable("nvcc was not found (put it on PATH or set CUDA_HOME)")


def cuda_architectures(nvcc: str) -> list[str]:
    """The architectures to compile for, as in TORCH_CUDA_ARCH_LIST ("9.0", "9.0a", "12.0+PTX"), that nvcc knows."""
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    asked = re.split(r"[\s;,]+", (os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).strip())
    for name in asked:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise Unavailable(f'TORCH_CUDA_ARCH_LIST: expected numbers such as "8.0;9.0+PTX", got {name}')
    chosen = [name for name in asked if re.sub(r"[af]?(\+PTX)?$", "", name).replace(".", "") in known]
    if not chosen:
        raise Unavailable(f"nvcc knows none of the architectures {' '.join(asked)}")
    if not any(name.endswith("+PTX") for name in chosen) and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        chosen[-1] += "+PTX"  # an older nvcc: the newest it knows serves the GPUs that came later
    return chosen


def gencode(architectures: list[str]) -> Iterator[str]:
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if name.endswith("+PTX"):
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


@dataclass
class Ninja:
    """A build.ninja in the making: only what changed is compiled again, headers and flags counted in."""

    folder: Path
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        command = "$compiler -MD -MF $out.d $flags -c $in -o $out"
        self.lines += ["rule compile", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
        self.lines += ["  description = compile $out", "rule link", "  description = link $out"]
        self.lines += ["  command = $compiler -shared $in $flags -o $out"]

    @staticmethod
    def escape(path: str | Path) -> str:
        return re.sub(r"([$: ])", r"$\1", str(path))

    def edge(self, rule: str, target: str, sources: list[str], compiler: str, flags: list[str]) -> None:
        self.lines.append(f"build {target}: {rule} {' '.join(map(self.escape, sources))}")
        for name, value in (("compiler", compiler), ("flags", shlex.join(flags))):
            self.lines.append(f"  {name} = {value.replace('$', '$$')}")

    def part(self, name: str, sources: Iterable[Path], compiler: str, flags: list[str], link: list[str]) -> None:
        objects = []
        for source in sorted(sources):
            objects.append(f"{name}/{source.stem}.o")
            self.edge("compile", objects[-1], [str(source)], compiler, flags)
        if not objects:
            raise Unavailable("there are no sources")
        self.edge("link", f"{name}.so", objects, compiler, link)

    def joined(self, name: str, sources: Iterable[Path], count: int) -> list[Path]:
        """Sources that include so many of these each."""
        texts = [f'#include "{source}"\n' for source in sorted(sources)]
        files = []
        for i in range(0, len(texts), count):
            file, text = self.folder / name / f"{name}{i // count}.cpp", "".join(texts[i : i + count])
            file.parent.mkdir(exist_ok=True)
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
            files.append(file)
        return files

    def run(self, parts: list[str]) -> dict[str, str]:
        """Builds the parts, and returns the output of those that failed."""
        ninja = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
        if ninja is None:
            raise Unavailable("ninja was not found (pip install ninja)")
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [ninja, "--quiet", "-C", str(self.folder), "-j", str(jobs())]
        if subprocess.run([*command, "-k0", *(f"{part}.so" for part in parts)]).returncode == 0:
            return {}
        again = {p: subprocess.run([*command, f"{p}.so"], capture_output=True, text=True) for p in parts}
        return {part: done.stdout for part, done in again.items() if done.returncode}


def jobs() -> int:
    """As many compilers as there are processors and memory (2 GB each) for."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    if not LINUX:
        return os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


class Build(build_ext):
    """build_ext by ninja. What fails is recorded, not raised, unless the environment asks for it."""

    def run(self) -> None:
        self.record: dict[str, object] = {
            "version": self.distribution.get_version(),
            "python": platform.python_version(),
        }
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one checkout take turns
            self.build_and_place(folder)

    def build_and_place(self, folder: Path) -> None:
        built: list[str] = []
        try:
            built = self.build_parts(Ninja(folder))
        except Unavailable as e:
            self.missing = {part: str(e) for part in PARTS}
        self.record.update(missing=self.missing, output=self.failed)
        for part, reason in self.missing.items():
            print(f"convblocks: {part} is left out: {reason}", file=sys.stderr)
        self.refuse_what_is_required()
        self.place(folder, built, Path(self.build_lib) / "convblocks")
        if self.inplace:
            self.place(folder, built, ROOT / "convblocks")

    def build_parts(self, ninja: Ninja) -> list[str]:
        if os.environ.get("CONVBLOCKS_BUILD") == "0":
            raise Unavailable("it was built with CONVBLOCKS_BUILD=0")
        torch = Torch.find()
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not compiler:
            raise Unavailable("no C++ compiler was found (g++ or clang++ on PATH, or set CXX)")
        version = output_of(*shlex.split(compiler), "--version").splitlines()
        self.record.update(torch=torch.version, torch_cuda=torch.cuda, compiler=version[0] if version else compiler)
        for part in PARTS:
            try:
                if part == "_cuda":
                    self.add_cuda(ninja, torch)
                else:
                    self.add_host(ninja, torch, compiler, part)
            except Unavailable as e:
                self.missing[part] = str(e)
        todo = [part for part in PARTS if part not in self.missing]
        for part, output in ninja.run(todo).items():
            lines = output.replace(f"{ROOT}/", "").strip().splitlines() or ["no output"]
            error = next((line for line in lines if re.search("error:|fatal|undefined|cannot find", line)), lines[-1])
            self.failed[part] = "\n".join(lines[-40:])
            self.missing[part] = f"it did not compile: {error.strip()}"
        return [part for part in todo if part not in self.missing]

    def add_host(self, ninja: Ninja, torch: Torch, compiler: str, part: str) -> None:
        """_C, or the CPU kernels for one instruction set."""
        sanitize = os.environ.get("CONVBLOCKS_SANITIZE")
        flags = ["-O0", "-g"] if DEBUG else ["-O1", "-g"] if sanitize else ["-O3", "-DNDEBUG"]
        flags += ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC}", *torch.include_flags()]
        link = [*torch.link_flags(), *(["-Wl,-z,relro,-z,now"] if LINUX else [])]
        if sanitize:
            flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
            link += [f"-fsanitize={sanitize}"]
        if part == "_C":
            flags += ["-DAT_PER_OPERATOR_HEADERS", *torch.compile_flags()]  # else each file reads all of ATen
            sources = ninja.joined(part, CSRC.glob("*.cpp"), 4)  # torch's headers take most of the time of one
            ninja.part(part, sources, compiler, flags, link)
            return
        isa = part.removeprefix("_cpu_")
        flags += [f"-DCPU_CAPABILITY={isa.upper()}", f"-DCPU_CAPABILITY_{isa.upper()}", *ISAS[isa]]
        flags += ["-fno-math-errno", "-fno-trapping-math"]
        ninja.part(part, CSRC.glob("cpu/*.cpp"), compiler, flags, link)

    def add_cuda(self, ninja: Ninja, torch: Torch) -> None:
        if os.environ.get("CONVBLOCKS_CUDA") == "0":
            raise Unavailable("it was built with CONVBLOCKS_CUDA=0")
        nvcc, version = find_nvcc(torch)
        architectures = cuda_architectures(nvcc)
        targets = list(gencode(architectures))
        flags = ["-O0", "-g", "-G"] if DEBUG else ["-O3", "-DNDEBUG", "-lineinfo"]
        flags += ["-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]
        flags += [f"-I{CSRC}", f"-isystem={torch.folder / 'include'}"]
        # Its own CUDA runtime inside, hidden, as cuBLAS and NCCL have theirs: it shares contexts and streams with that
        # of torch, and nothing depends on where, or in which version, torch keeps its libcudart.
        link = ["-cudart=static", *targets, *(["-Xlinker=--exclude-libs", "-Xlinker=ALL"] if LINUX else [])]
        ninja.part("_cuda", CSRC.glob("cuda/*.cu"), nvcc, flags, link)
        self.record.update(nvcc=version, cuda_architectures=architectures)

    def refuse_what_is_required(self) -> None:
        """A part whose tools are all there must build; without them only _cuda may be left out quietly."""
        required = [part for part in self.missing if part != "_cuda" or part in self.failed]
        if enabled("CONVBLOCKS_REQUIRE_EXT") and required:
            raise SystemExit(
                f"convblocks: CONVBLOCKS_REQUIRE_EXT is set, and {required[0]}: {self.missing[required[0]]}"
            )
        if os.environ.get("CONVBLOCKS_CUDA") == "1" and "_cuda" in self.missing:
            raise SystemExit(f"convblocks: CONVBLOCKS_CUDA=1 is set, and _cuda: {self.missing['_cuda']}")

    def place(self, folder: Path, built: list[str], package: Path) -> None:
        """Puts what was built and its record into the package, and takes out what an earlier build left there.

        Files are replaced, never rewritten: a running process may have them mapped.
        """
        package.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            source, target = folder / f"{part}.so", package / f"{part}.so"
            if part not in built:
                target.unlink(missing_ok=True)
            elif not target.exists() or target.stat().st_mtime_ns != source.stat().st_mtime_ns:
                temporary = target.with_suffix(".so.new")
                shutil.copy2(source, temporary)
                os.replace(temporary, target)
        (package / "_build_info.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {new: old for new, old in super().get_output_mapping().items() if Path(new).exists()}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["convblocks", "convblocks.*"]),
        "convblocks.kernels",
        *(f"convblocks.kernels.{name}" for name in find_namespace_packages("kernels")),
    ],
    package_dir={"convblocks": "convblocks", "convblocks.kernels": "kernels"},
    ext_modules=[Extension(f"convblocks.{part}", [], optional=True) for part in PARTS],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
