"""What ``import convblocks`` costs and brings in, each time in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURE = """
import json, sys, time
import torch
of_torch = time.process_time()
before, start = set(sys.modules), time.process_time()
import convblocks
seconds = (time.process_time() - start) / of_torch
print(json.dumps([seconds, sorted(m.split(".")[0] for m in set(sys.modules) - before)]))
"""


def fresh_import() -> tuple[float, set[str]]:
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_brings_in_nothing_heavy() -> None:
    _, modules = fresh_import()
    assert "convblocks" in modules
    assert not modules & {
        "triton",
        "timm",
        "torchvision",
        "torch",
        "numpy",
        "rich",
    }  # torch: none that it left for later


def test_takes_little_beside_what_torch_takes() -> None:
    assert min(fresh_import()[0] for _ in range(10)) < 0.06
