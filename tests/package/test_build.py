"""setup.py: what it builds, what it leaves out and why. On small sources, so that each build takes a second."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
ISAS = ["default", *(["avx2", "avx512"] if platform.machine() == "x86_64" else [])]
KERNEL = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or not sys.platform.startswith("linux"), reason="needs g++ on Linux"
)


class Project:
    """A copy of what setup.py reads, with kernels of one line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, folder)
        (folder / "convblocks").mkdir()
        (folder / "convblocks/__init__.py").write_text('__version__ = "0.0.1"\n')
        (folder / "kernels").mkdir()
        self.write("csrc/answer.h", "")
        self.write("csrc/answer.cpp", '#include "answer.h"\n' + KERNEL)
        self.write("csrc/cpu/answer.cpp", KERNEL)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CONVBLOCKS_") and k != "TORCH_CUDA_ARCH_LIST"}
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=self.folder,
            env=kept | {"CONVBLOCKS_CUDA": "0"} | environment,
            capture_output=True,
            text=True,
        )

    def built(self) -> list[str]:
        return sorted(file.stem for file in (self.folder / "convblocks").glob("*.so"))

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "convblocks/_build_info.json").read_text())
        return record


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def everything() -> list[str]:
    return sorted(["_C", *(f"_cpu_{isa}" for isa in ISAS)])


def tools(folder: Path, *names: str) -> str:
    """A PATH with nothing but these."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)


def test_builds_every_part_and_records_it(project: Project) -> None:
    import torch

    done = project.build(CONVBLOCKS_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr
    assert project.built() == everything()
    record = project.record()
    assert record["torch"] == torch.__version__
    assert record["missing"] == {"_cuda": "it was built with CONVBLOCKS_CUDA=0"}
    assert record["output"] == {}


def test_compiles_only_what_changed(project: Project) -> None:
    project.build()
    objects = {file: file.stat().st_mtime_ns for file in project.folder.glob("build/**/*.o")}
    project.build()
    assert {file: file.stat().st_mtime_ns for file in objects} == objects
    project.write("csrc/answer.h", "// a header that only one source includes\n")
    project.build()
    changed = {file.parent.name for file, before in objects.items() if file.stat().st_mtime_ns != before}
    assert changed == {"_C"}


def test_a_part_that_does_not_compile_is_left_out_alone(project: Project) -> None:
    if len(ISAS) == 1:
        pytest.skip("one instruction set")
    project.build()
    fault = '#ifdef CPU_CAPABILITY_AVX512\n#error "planted"\n#endif\n'
    project.write("csrc/cpu/answer.cpp", fault + KERNEL)
    done = project.build()
    assert done.returncode == 0
    assert project.built() == [part for part in everything() if part != "_cpu_avx512"]
    record = project.record()
    assert "planted" in record["missing"]["_cpu_avx512"]
    assert "planted" in record["output"]["_cpu_avx512"]
    assert "planted" in done.stderr


def test_what_fails_is_an_error_where_it_is_required(project: Project) -> None:
    project.build()
    project.write("csrc/cpu/answer.cpp", "#error planted\n")
    done = project.build(CONVBLOCKS_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "CONVBLOCKS_REQUIRE_EXT" in done.stderr
    assert project.built() == everything()  # those of the last build that worked


def test_without_a_compiler(project: Project, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "ninja")
    done = project.build(PATH=path)
    assert done.returncode == 0, done.stderr
    assert project.built() == []
    reason = "no C++ compiler was found (g++ or clang++ on PATH, or set CXX)"
    assert set(project.record()["missing"].values()) == {reason}
    assert project.build(PATH=path, CONVBLOCKS_REQUIRE_EXT="1").returncode != 0


def test_with_a_compiler_that_does_not_work(project: Project) -> None:
    assert project.build(CXX="false").returncode == 0
    assert project.built() == []
    assert project.record()["missing"]["_C"].startswith("it did not compile: ")


def test_builds_nothing_if_told_so(project: Project) -> None:
    project.build()
    assert project.build(CONVBLOCKS_BUILD="0", CONVBLOCKS_REQUIRE_EXT="0").returncode == 0
    assert project.built() == []
    assert set(project.record()["missing"].values()) == {"it was built with CONVBLOCKS_BUILD=0"}


def test_debug_and_sanitizers_reach_the_compiler(project: Project) -> None:
    guard = "#if defined(NDEBUG) || !defined(__SANITIZE_ADDRESS__)\n#error plain\n#endif\n"
    project.write("csrc/answer.cpp", guard + KERNEL)
    project.build()
    assert "plain" in project.record()["missing"]["_C"]
    done = project.build(CONVBLOCKS_DEBUG="1", CONVBLOCKS_SANITIZE="address,undefined", CONVBLOCKS_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr


# --- CUDA, with scripts in the place of nvcc --------------------------------------------------------------------------

FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 12.0, V12.0.88" ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
  *) {compile} ;;
esac
"""
WORKS = 'while [ "$1" != -o ]; do shift; done; echo > "$2"'


def fake_nvcc(folder: Path, compile: str = WORKS) -> dict[str, str]:
    """CUDA_HOME of an nvcc that knows three architectures; and a torch built for CUDA 13, whatever torch is here."""
    nvcc = folder / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC.format(compile=compile))
    nvcc.chmod(0o755)
    torch = folder / "site/torch"
    (torch / "include").mkdir(parents=True)
    (torch / "version.py").write_text('__version__ = "2.14.0+cu130"\ncuda = "13.0"\n')
    (folder / "project/csrc/cuda").mkdir()
    (folder / "project/csrc/cuda/answer.cu").write_text(KERNEL)
    return {"CUDA_HOME": str(folder / "cuda"), "PYTHONPATH": str(folder / "site"), "CONVBLOCKS_CUDA": ""}


@pytest.fixture
def cuda_project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project")


def test_cuda_kernels_for_what_nvcc_knows(cuda_project: Project, tmp_path: Path) -> None:
    done = cuda_project.build(**fake_nvcc(tmp_path))
    assert "_cuda" in cuda_project.built(), done.stderr
    record = cuda_project.record()
    assert record["cuda_architectures"] == ["8.0", "9.0+PTX"]
    assert record["nvcc"] == "12.0.88"
    commands = next((cuda_project.folder / "build").glob("temp*/build.ninja")).read_text()
    for part in ("code=sm_80", "code=sm_90", "code=compute_90"):
        assert f"-gencode=arch=compute_{part[-2:]},{part}" in commands
    assert "code=compute_80" not in commands


@pytest.mark.parametrize(
    ("asked", "built"),
    [("7.5 8.0;9.0+PTX", ["7.5", "8.0", "9.0+PTX"]), ("5.2;9.0a", ["9.0a"]), ("12.0", None), ("Hopper", None)],
)
def test_cuda_architectures_by_environment(
    cuda_project: Project, tmp_path: Path, asked: str, built: list[str] | None
) -> None:
    cuda_project.build(**fake_nvcc(tmp_path), TORCH_CUDA_ARCH_LIST=asked)
    assert cuda_project.record().get("cuda_architectures") == built
    if built is None:
        assert asked in cuda_project.record()["missing"]["_cuda"]


def test_cuda_that_does_not_compile(cuda_project: Project, tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path, compile='echo "answer.cu(1): error: planted" >&2; exit 2')
    done = cuda_project.build(**environment)
    assert done.returncode == 0
    assert cuda_project.record()["missing"]["_cuda"] == "it did not compile: answer.cu(1): error: planted"
    assert "_cuda" not in cuda_project.built()
    for required in ({"CONVBLOCKS_CUDA": "1"}, {"CONVBLOCKS_REQUIRE_EXT": "1"}):
        assert cuda_project.build(**environment | required).returncode != 0


def test_torch_without_cuda(cuda_project: Project, tmp_path: Path) -> None:
    environment = fake_nvcc(tmp_path)
    (tmp_path / "site/torch/version.py").write_text('__version__ = "2.13.0+cpu"\ncuda = None\n')
    cuda_project.build(**environment)
    assert cuda_project.record()["missing"]["_cuda"] == "torch 2.13.0+cpu is built without CUDA"


# --- setup.py's functions ---------------------------------------------------------------------------------------------


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_jobs(functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= functions["jobs"]() <= (os.cpu_count() or 1)
    monkeypatch.setenv("MAX_JOBS", "7")
    assert functions["jobs"]() == 7


def test_without_torch(functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sysconfig

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(functions["Unavailable"], match="torch is not installed"):
        functions["Torch"].find()


def test_takes_the_first_nvcc_that_is_not_newer_than_torch(
    functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"/new/bin/nvcc": "14.1.5", "/right/nvcc": "13.0.88"}

    def output_of(nvcc: str, *_: str) -> str:
        version = versions.get(nvcc)
        return f"release {version[:4]}, V{version}" if version else ""

    find_nvcc, torch = functions["find_nvcc"], functions["Torch"](Path(), "2.14.0+cu130", "13.0")
    monkeypatch.setitem(find_nvcc.__globals__, "output_of", output_of)
    monkeypatch.setattr(shutil, "which", lambda name: "/right/nvcc")
    monkeypatch.setenv("CUDA_HOME", "/new")
    monkeypatch.delenv("CONVBLOCKS_CUDA", raising=False)
    assert find_nvcc(torch) == ("/right/nvcc", "13.0.88")
    monkeypatch.setenv("CONVBLOCKS_CUDA", "1")  # whoever asks for it knows the driver
    assert find_nvcc(torch) == ("/new/bin/nvcc", "14.1.5")
    monkeypatch.delenv("CONVBLOCKS_CUDA")
    del versions["/right/nvcc"]
    with pytest.raises(functions["Unavailable"], match=r"nvcc 14\.1\.5 is newer than the CUDA 13\.0 of torch"):
        find_nvcc(torch)
    versions.clear()
    with pytest.raises(functions["Unavailable"], match="nvcc was not found"):
        find_nvcc(torch)
