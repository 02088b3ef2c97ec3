"""``python -m convblocks info``: what runs here, what does not, and why."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import convblocks
from convblocks import backends
from convblocks.opinfo import OPS
from convblocks.tables import Table

# Besides all that begin with CONVBLOCKS_.
VARIABLES = ("TRITON_INTERPRET", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of the NVIDIA driver."""
    with contextlib.suppress(OSError):
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return found[1] if found else None
    return None


def gpus() -> list[dict[str, Any]]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        capability = f"{p.major}.{p.minor}"
        found.append({"name": p.name, "compute_capability": capability, "memory_gib": round(p.total_memory / 2**30, 1)})
    return found


def cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    isas = {"torch": torch.backends.cpu.get_cpu_capability().lower(), "kernels": backends.cpu_isa}
    return {"name": name, "threads": torch.get_num_threads(), "isa": isas}


def parts() -> dict[str, str | None]:
    """Each shared object of the compiled part, with the reason why it is not there."""
    record, folder = backends.build_record(), Path(backends.__file__).parent
    found = {file.stem: None for file in folder.glob("_*.so")}
    known: dict[str, str | None] = {"_C": "it is not built"}
    return dict(sorted((known | record.get("missing", {}) | found).items()))


def stale() -> str | None:
    """What is wrong with a compiled part that another torch was there to build."""
    built = backends.build_record().get("torch")
    if built is None or built == torch.__version__:
        return None
    return f"built for torch {built}, running with {torch.__version__}: build it again"


def operations() -> dict[str, dict[str, dict[str, str | None]]]:
    """Operation, backend, dtype: None where it runs, else the reason."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

    def reason(op: str, backend: str, dtype: torch.dtype) -> str | None:
        general = backends.why_not(op, backend)
        if general is not None:
            return general
        each = [backends.why_not(op, backend, torch.empty(1, 1, 1, 1, dtype=dtype, device=d)) for d in devices]
        return None if None in each else each[-1]

    return {
        op: {b: {str(d).removeprefix("torch."): reason(op, b, d) for d in info.dtypes} for b in backends.BACKENDS[1:]}
        for op, info in OPS.items()
    }


def automatic() -> dict[str, dict[str, str]]:
    """What "auto" takes for an input on each device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: {d: backends.which(op, torch.empty(1, 1, 1, 1, device=d)) for d in devices} for op in OPS}


def collect() -> dict[str, Any]:
    """All of it, as ``--json`` prints it."""
    environment = {k: v for k, v in sorted(os.environ.items()) if k.startswith("CONVBLOCKS_") or k in VARIABLES}
    return {
        "convblocks": convblocks.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "platform": platform.platform(),
        "cpu": cpu(),
        "cuda": {"torch": torch.version.cuda, "driver": driver(), "gpus": gpus()},
        "extension": {
            "loaded": backends.extension_error is None,
            "reason": backends.extension_error,
            "parts": parts(),
            "stale": stale(),
            "build": backends.build_record(),
        },
        "backend": backends.selected,
        "automatic": automatic(),
        "operations": operations(),
        "by_torch": {op: record.by_torch for op, record in OPS.items() if record.by_torch},
        "environment": environment,
    }


def show(info: dict[str, Any]) -> None:
    build = info["extension"]["build"]
    table = Table("Versions", ["what", "value"])
    for name in ("convblocks", "python", "torch", "triton", "platform"):
        table.add(name, info[name] or "not installed")
    isa = info["cpu"]["isa"]
    table.add("cpu", f"{info['cpu']['name']}, {info['cpu']['threads']} threads")
    table.add("instruction set", f"{isa['kernels'] or 'no kernels'} (torch: {isa['torch']})")
    cuda = info["cuda"]
    torchs = f"torch is built {'for CUDA ' + cuda['torch'] if cuda['torch'] else 'without CUDA'}"
    table.add("cuda", f"{torchs}, driver {cuda['driver'] or 'not found'}")
    for i, gpu in enumerate(cuda["gpus"]):
        table.add(f"gpu {i}", f"{gpu['name']}, {gpu['compute_capability']}, {gpu['memory_gib']} GiB")
    for name in ("torch", "compiler", "nvcc"):
        if name in build:
            table.add(f"built with {name}", build[name])
    if "cuda_architectures" in build:
        table.add("built for", " ".join(build["cuda_architectures"]))
    table.print()

    table = Table("Compiled part", ["file", "state"])
    for name, reason in info["extension"]["parts"].items():
        table.add(f"{name}.so", "built" if reason is None else f"missing: {reason}", bad=reason is not None)
    if info["extension"]["reason"]:
        table.add("not loaded", info["extension"]["reason"], bad=True)
    if info["extension"]["stale"]:
        table.add("stale", info["extension"]["stale"], bad=True)
    table.print()
    for name, output in build.get("output", {}).items():
        print(f"The compiler on {name}:\n{output}\n")

    reasons: list[str] = []
    table = Table("Operations (auto takes *)", ["operation", "backend", "dtypes"])
    for op, by_backend in info["operations"].items():
        for backend, by_dtype in by_backend.items():
            words = " ".join(dtype for dtype, reason in by_dtype.items() if reason is None)
            for reason in dict.fromkeys(r for r in by_dtype.values() if r is not None):
                reasons += [reason] if reason not in reasons else []
                words = f"{words or 'none'} [{reasons.index(reason) + 1}]"
            star = " *" if backend in info["automatic"][op].values() else ""
            table.add(op, backend + star, words)
    table.print()
    for i, reason in enumerate(reasons):
        print(f"[{i + 1}] {reason}")
    table = Table("Left to torch (oneDNN, cuDNN), as faster or alone", ["operation", "what"])
    for op, what in info["by_torch"].items():
        table.add(op, what)
    table.print()
    forced = f"; every operation runs on {info['backend']}" if info["backend"] != "auto" else ""
    print(f"Environment: {' '.join(f'{k}={v}' for k, v in info['environment'].items()) or 'nothing set'}{forced}")


def main(as_json: bool) -> int:
    info = collect()
    if as_json:
        print(json.dumps(info, indent=1))
    else:
        show(info)
    return 0
