"""python -m convblocks info | check."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convblocks import __main__, __version__, backends, check, info
from convblocks.opinfo import OPS
from convblocks.tables import Table

ROOT = Path(__file__).parents[2]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "convblocks", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_info_as_json_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["convblocks"] == __version__
    assert facts["torch"] == torch.__version__
    assert facts["operations"].keys() == OPS.keys()
    for op, by_backend in facts["operations"].items():
        assert list(by_backend) == list(backends.BACKENDS[1:])
        assert set(by_backend["reference"].values()) == {None}
        for backend, by_dtype in by_backend.items():
            assert (set(by_dtype.values()) == {None}) == (backends.why_not(op, backend) is None)


def test_info_for_people_names_every_operation_part_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    facts = info.collect()
    assert {"dense_conv2d", "partial_conv2d"} == facts["by_torch"].keys()
    reasons = [r for by_backend in facts["operations"].values() for d in by_backend.values() for r in d.values() if r]
    for word in (*OPS, *facts["extension"]["parts"], *reasons, torch.__version__):
        assert word in text


def test_info_and_check_without_the_compiled_part() -> None:
    done = command("info", CONVBLOCKS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert "not loaded" in done.stdout
    assert "CONVBLOCKS_BUILD=0" in done.stdout
    done = command("check", CONVBLOCKS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert "not run: CONVBLOCKS_BUILD=0" in done.stdout


def test_info_says_that_the_build_is_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "build_record", lambda: {"torch": "2.11.0+cu130", "missing": {"_cuda": "no nvcc"}})
    facts = info.collect()
    assert (
        facts["extension"]["stale"] == f"built for torch 2.11.0+cu130, running with {torch.__version__}: build it again"
    )


def test_check_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(" ok, " in line for line in lines) >= len(OPS)


def test_check_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name, right = next(iter(OPS.items()))
    wrong = dataclasses.replace(right, op=lambda *args, **kwargs: right.op(*args, **kwargs) * 1.01)
    monkeypatch.setattr(check, "OPS", {name: wrong})
    assert check.main() == 1
    assert re.search(r"output: error \S+, allowed ", capsys.readouterr().out)


def test_check_reports_an_operation_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nsecond line")

    name, right = next(iter(OPS.items()))
    monkeypatch.setattr(check, "OPS", {name: dataclasses.replace(right, op=fail)})
    assert check.main() == 1
    assert "no kernel image is available" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["describe"], ["info", "--yaml"], ["check", "simam"]])
def test_refuses_what_it_does_not_know(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m convblocks" in capsys.readouterr().err


def test_table_in_columns() -> None:
    table = Table("Title", ["a", "long name"])
    table.add("first", "x")
    table.add("", "y", bad=True)
    assert str(table) == "Title\n  a      long name\n  first  x\n         y"
