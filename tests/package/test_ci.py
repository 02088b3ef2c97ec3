"""The scripts in .ci that the Makefile calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PASSING = "def test_a(): pass\ndef test_b(): pass\n"


def script(name: str, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, cwd / ".ci" / name, *arguments], capture_output=True, text=True)


def report(folder: Path, name: str, tests: str) -> Path:
    file, xml = folder / f"test_{name}.py", folder / f"{name}.xml"
    file.write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--rootdir={folder}", f"--junitxml={xml}", file]
    subprocess.run(command, cwd=folder, capture_output=True)
    return xml


def test_summary_adds_up(tmp_path: Path) -> None:
    one = report(tmp_path, "one", PASSING)
    two = report(tmp_path, "two", "import pytest\ndef test_c(): pass\ndef test_d(): pytest.skip('not here')\n")
    done = script("summary.py", one, two)
    assert done.returncode == 0
    assert "3 passed, 1 skipped" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("def test_c(): assert False\n", "1 failed, 2 passed"),
        ("import nothing_of_that_name\n", "1 errors, 2 passed"),
    ],
)
def test_summary_fails_with_any_run(tmp_path: Path, tests: str, words: str) -> None:
    done = script("summary.py", report(tmp_path, "one", PASSING), report(tmp_path, "two", tests))
    assert done.returncode == 1
    assert words in done.stdout.splitlines()[-1]


def test_requirements_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/requirements.py", tmp_path / ".ci")
    lines = ('[build-system]\nrequires = ["setuptools>=77"]', "[project.optional-dependencies]")
    extra = 'some = ["pytest>=8", "pytest>=9999", "pytest==1.0", "torch", "no-package-of-that-name>=1.2"]\n'
    (tmp_path / "pyproject.toml").write_text("\n".join((*lines, extra)))
    pin = f"torch=={torch.__version__.split('+')[0]}"
    missing = ["no-package-of-that-name>=1.2", "pytest==1.0", "pytest>=9999"]
    assert script("requirements.py", "some", cwd=tmp_path).stdout.split() == [*missing, pin]
    assert script("requirements.py", "pytest", "another-missing", cwd=tmp_path).stdout.split() == [
        "another-missing",
        pin,
    ]
    assert script("requirements.py", "build", "pytest", cwd=tmp_path).stdout == ""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_lists_its_targets() -> None:
    lines = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, env=os.environ).stdout
    for target in ("demo", "test", "test-slow", "bench", "gpu", "lint", "build", "clean"):
        assert f"make {target} " in lines
