"""Every way to install: where ``convblocks.kernels`` is found, and what the wheel and the sdist hold.

The checkout that is installed has C++ sources of one line; so the package is imported without its compiled part.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FROM_CHECKOUT = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile", "csrc", "kernels")
ISAS = ("default", "avx2", "avx512") if platform.machine() == "x86_64" else ("default",)
BUILT = {"_C.so", *(f"_cpu_{isa}.so" for isa in ISAS)} if shutil.which("g++") else set()
IMPORTS = """
import convblocks, convblocks.kernels.simam, importlib.util
assert convblocks.kernels.simam.__name__ == "convblocks.kernels.simam"
print(convblocks.__file__)
print(convblocks.kernels.simam.__file__)
print(importlib.util.find_spec("kernels").origin if importlib.util.find_spec("kernels") else None)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CONVBLOCKS_", "PYTHON"))}
    env = kept | {"CONVBLOCKS_CUDA": "0"} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_checkout(folder: Path, sources: bool = False) -> Path:
    clean = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in (*FROM_CHECKOUT, "convblocks", "tests", "bench", ".ci", "CHANGELOG.md", "CONTRIBUTING.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=clean)
        else:
            shutil.copy(source, folder)
    if not sources:
        for file in (folder / "csrc").rglob("*.cpp"):
            file.write_text("")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_checkout(tmp_path_factory.mktemp("checkout"))


class Environment:
    """A new virtual environment that sees the packages of this one, torch among them, but installs into itself."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin/python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        (self.site / "others.pth").write_text(sysconfig.get_path("purelib"))

    def install(self, *arguments: str | Path, cwd: Path, **environment: str) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--no-build-isolation")
        run(*pip, "--quiet", "--no-index", "--disable-pip-version-check", *arguments, cwd=cwd, **environment)

    def imports(self, cwd: Path) -> tuple[Path, Path, str]:
        """The files of convblocks and of its kernels, and what ``import kernels`` would give."""
        package, kernels, foreign = run(self.python, "-c", IMPORTS, cwd=cwd, CONVBLOCKS_BUILD="0").splitlines()
        return Path(package), Path(kernels), foreign


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", folder, ".", cwd=checkout)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=checkout)
    return next(folder.glob("*.tar.gz"))


def parts(package: Path) -> set[str]:
    return {file.name for file in package.glob("*.so")}


def foreign_kernels(site: Path) -> str:
    """A package named ``kernels``, as Hugging Face has one."""
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("")
    return str(site / "kernels/__init__.py")


def test_checkout(environment: Environment, checkout: Path) -> None:
    package, kernels, _ = environment.imports(cwd=checkout)
    assert (package.parent, kernels.parent) == (checkout / "convblocks", checkout / "kernels")


def test_checkout_beside_a_package_named_kernels(environment: Environment, checkout: Path) -> None:
    theirs = foreign_kernels(environment.site)
    _, kernels, foreign = environment.imports(cwd=checkout)
    assert (kernels.parent, foreign) == (checkout / "kernels", theirs)


@pytest.mark.parametrize("mode", ["lenient", "compat", "strict"])
def test_editable(environment: Environment, tmp_path: Path, mode: str) -> None:
    (tmp_path / "checkout").mkdir()
    checkout = copy_of_checkout(tmp_path / "checkout")
    theirs = foreign_kernels(environment.site)
    environment.install("-e", ".", "--config-settings", f"editable_mode={mode}", cwd=checkout)
    for place in (tmp_path, checkout):
        package, kernels, foreign = environment.imports(cwd=place)
        assert foreign == theirs
        assert kernels.resolve() == checkout / "kernels/simam.py" or kernels.samefile(checkout / "kernels/simam.py")
        assert package.samefile(checkout / "convblocks/__init__.py")
        assert parts(package.parent) == BUILT


def test_wheel(environment: Environment, wheel: Path, checkout: Path, tmp_path: Path) -> None:
    assert f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}" in wheel.name
    theirs = foreign_kernels(environment.site)
    environment.install(wheel, cwd=tmp_path)
    package, kernels, foreign = environment.imports(cwd=tmp_path)
    assert foreign == theirs
    assert (package.parent, kernels.parent) == (
        environment.site / "convblocks",
        environment.site / "convblocks/kernels",
    )
    _, kernels, _ = environment.imports(cwd=checkout)  # the checkout comes first, and finds its own kernels
    assert kernels.parent == checkout / "kernels"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(f.relative_to(checkout)) for f in (checkout / "convblocks").rglob("*.py")}
    expected |= {
        f"convblocks/kernels/{f.relative_to(checkout / 'kernels')}" for f in (checkout / "kernels").rglob("*.py")
    }
    expected |= {"convblocks/py.typed", "convblocks/_build_info.json", *(f"convblocks/{part}" for part in BUILT)}
    assert {n for n in names if ".dist-info/" not in n} == expected
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_sdist_can_do_what_a_checkout_can(
    environment: Environment, checkout: Path, sdist: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    rooms = [f for room in ("csrc", "kernels", "tests", "bench", ".ci") for f in (checkout / room).rglob("*")]
    files = [f.relative_to(checkout) for f in rooms if f.suffix in (".py", ".h", ".cpp", ".cu")]
    assert [f for f in files if not (unpacked / f).is_file()] == []
    assert not [*unpacked.rglob("*.so")]
    environment.install(unpacked, cwd=tmp_path)
    _, kernels, _ = environment.imports(cwd=tmp_path)
    assert kernels.parent == environment.site / "convblocks/kernels"


@pytest.mark.slow
def test_wheel_with_the_compiled_part(environment: Environment, tmp_path: Path) -> None:
    """Built inside pip's isolation, against the torch that it hides."""
    (tmp_path / "checkout").mkdir()
    checkout = copy_of_checkout(tmp_path / "checkout", sources=True)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path)
    run(*pip, ".", cwd=checkout, CONVBLOCKS_REQUIRE_EXT="1")
    environment.install(next(tmp_path.glob("*.whl")), cwd=tmp_path)
    table = run(environment.python, "-m", "convblocks", "check", cwd=tmp_path)
    assert (
        sum(line.split()[1] == "cpu" and " ok, " in line for line in table.splitlines() if line.startswith("  ")) >= 3
    )
