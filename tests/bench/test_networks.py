from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from bench import networks


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["networks", *arguments])
    return networks.main()


def test_times_networks_that_agree(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert _run(monkeypatch, "squeezenet1_1", "--seconds", "0.01") == 0
    said = capsys.readouterr().out
    assert "squeezenet1_1" in said
    assert "->" in said
    assert torch.__version__ in said


def test_times_no_network_that_does_not_agree(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    convert = networks.convblocks.convert_state_dict

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return {key: t * 1.1 if key == "classifier.1.weight" else t for key, t in convert(*args, **kwargs).items()}

    monkeypatch.setattr(networks.convblocks, "convert_state_dict", wrong)
    assert _run(monkeypatch, "squeezenet1_1") == 1
    said = capsys.readouterr().out
    assert "does not agree" in said
    assert "->" not in said


def test_an_unknown_network(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        _run(monkeypatch, "resnet5")
    assert "expected names of vgg16, " in capsys.readouterr().err
