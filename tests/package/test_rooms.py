"""Each operation has its file in each room of the house (CONTRIBUTING.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from convblocks.opinfo import OPS

ROOT = Path(__file__).parents[2]
ROOMS = ("convblocks/ops/{}.py", "csrc/{}.h", "csrc/{}.cpp", "csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "kernels/{}.py")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("room", ROOMS)
def test_has_its_file(op: str, room: str) -> None:
    assert (ROOT / room.format(op)).is_file()


def test_kernels_import_nothing_of_the_package_but_kernels() -> None:
    imports = [
        (file.name, line)
        for file in (ROOT / "kernels").rglob("*.py")
        for line in file.read_text().splitlines()
        if line.lstrip().startswith(("import convblocks", "from convblocks"))
    ]
    assert [i for i in imports if "convblocks.kernels" not in i[1]] == []
