"""The demo says so when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convblocks
from convblocks.accelerate import Report
from tests.accelerate.sources import network

pytest.importorskip("rich")

from bench import demo


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demo, "NETWORKS", {"small": lambda: nn.Sequential(network(), nn.Flatten(), nn.Linear(24 * 12 * 12, 3))}
    )
    monkeypatch.setattr(demo, "COMPARED", (2, 3, 16, 16))
    monkeypatch.setattr(demo, "TIMED", 16)
    monkeypatch.setattr(demo, "SECONDS", 0.0)


def test_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert "3 of 3 blocks replaced, agrees" in out
    assert "1 EcaModule -> eca" in out
    assert "NO" not in out
    for word in ("float32 output, folded", "channels_last", "NCHW"):
        assert word in out


@pytest.mark.parametrize("amount", [1e-4, float("nan")])
def test_a_slightly_wrong_block_is_reported(
    amount: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerate = convblocks.accelerate

    def wrong(model: Any, **options: Any) -> Report:
        report = accelerate(model, **options)
        with torch.no_grad():
            model[0][2].fc2.bias.add_(amount)
        return report

    monkeypatch.setattr(convblocks, "accelerate", wrong)
    assert demo.main() == 1
    out = capsys.readouterr().out
    assert "DOES NOT AGREE" in out
    assert "These networks do not agree: small" in out


def test_nothing_replaced_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(convblocks, "accelerate", lambda model, **options: Report("small"))
    assert demo.main() == 1
    assert "0 of 0 blocks replaced" in capsys.readouterr().out


def test_a_missing_library_is_named() -> None:
    code = "import sys, runpy; sys.modules['timm'] = None; runpy.run_module('bench.demo', run_name='__main__')"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "demo: expected timm, torchvision and rich, got: " in done.stderr
    assert "pip install timm torchvision rich" in done.stderr
