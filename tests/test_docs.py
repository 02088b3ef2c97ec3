"""The examples in the documentation run: those of docstrings, and the Python blocks of README.md."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import timm
import torch

import convblocks
from convblocks import ops

PACKAGE = Path(convblocks.__file__).parent
README = PACKAGE.parent / "README.md"


def _module_names() -> list[str]:
    found = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "convblocks.")]
    return ["convblocks", *(name for name in found if "._" not in name and ".kernels" not in name)]


@pytest.mark.parametrize("name", _module_names())
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    globs = {**vars(module), "torch": torch, "timm": timm, "convblocks": convblocks}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=globs):
        report: list[str] = []
        runner.run(example, out=report.append)
        assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", ops.__all__)
def test_each_operation_has_an_example_and_a_source(name: str) -> None:
    text = inspect.getdoc(getattr(ops, name)) or ""
    assert doctest.DocTestParser().get_examples(text)
    for word in ("Args:", "Returns:", "Raises:", "et al."):
        assert word in text


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as one program, in an empty folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), variables)
