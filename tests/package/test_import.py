"""What ``import convblocks`` costs and brings in, each time in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import convblocks
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(m.split(".")[0] for m in set(sys.modules) - before)]))
"""


def fresh_import(bytecode: Path) -> tuple[float, set[str]]:
    """With a cache of bytecode, as an installed package has it, whatever the environment says."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_brings_in_nothing_heavy(tmp_path: Path) -> None:
    _, modules = fresh_import(tmp_path)
    assert "convblocks" in modules
    assert not modules & {
        "triton",
        "timm",
        "torchvision",
        "torch",
        "numpy",
        "rich",
    }  # torch: none that it left for later


def test_takes_less_than_a_tenth_of_a_second(tmp_path: Path) -> None:
    assert min(fresh_import(tmp_path)[0] for _ in range(3)) < 0.1
