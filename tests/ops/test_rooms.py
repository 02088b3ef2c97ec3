"""One operation, one name, one file in each room."""

from __future__ import annotations

from pathlib import Path

import pytest

from convblocks import backends, ops
from convblocks.opinfo import OPS
from tests.ops.common import once

pytestmark = once

ROOT = Path(__file__).parent.parent.parent
ROOMS = (
    "convblocks/ops/{}.py",
    "convblocks/opinfo/{}.py",
    "csrc/{}.h",
    "csrc/{}.cpp",
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "kernels/{}.py",
    "tests/ops/test_{}.py",
)


def test_records_functions_and_operators_are_the_same() -> None:
    operators = {o.variant_of or o.name for o in backends.operators.values()}
    assert set(OPS) == set(ops.__all__) - {"spatial_attention"} == operators  # which is composed of others
    assert all(info.name == name and info.op is getattr(ops, name) for name, info in OPS.items())


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", OPS)
def test_has_its_file(name: str, room: str) -> None:
    assert (ROOT / room.format(name)).is_file()


def test_kernels_import_nothing_of_the_package_but_kernels() -> None:
    imports = [
        (file.name, line)
        for file in (ROOT / "kernels").rglob("*.py")
        for line in file.read_text().splitlines()
        if line.lstrip().startswith(("import convblocks", "from convblocks"))
    ]
    assert [i for i in imports if "convblocks.kernels" not in i[1]] == []
