"""``python -m bench run``: the rows, the gate before the timing, interruption and bad arguments."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bench
from bench import cases
from bench.__main__ import main
from bench.cases import PRESETS, call, convert, plan
from bench.results import Results
from convblocks import backends
from convblocks.opinfo import OPS, TIMED
from tests.bench.common import SMALL, run

ROOT = Path(bench.__file__).parent.parent
OP = next(iter(OPS))
CPU = torch.device("cpu")


def test_every_row_carries_what_it_was_and_what_it_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    assert run("--output", str(file), "--dtype", "bfloat16", "--threads", "1") == 0
    results = Results.load(file)
    assert (
        len(results.rows)
        == results.header["planned_rows"]
        == sum(len(info.bench) for info in TIMED.values()) * 2 * 2 * 2
    )
    assert len({r.key for r in results.rows}) == len(results.rows)
    assert {(r.op, r.dtype, r.mode, r.layout) for r in results.rows} == {
        (op, "bfloat16", mode, layout)
        for op in TIMED
        for mode in ("fwd", "fwd+bwd")
        for layout in ("contiguous", "channels_last")
    }
    for r in results.rows:
        assert r.verified
        assert r.threads == 1
        assert r.backend == backends.which(TIMED[r.op].dispatched, torch.empty(1))
        assert set(r.peers) == {"eager/contiguous", "eager/channels_last"}
        assert r.ours
        assert r.ours.min <= r.ours.q1 <= r.ours.median <= r.ours.q3
        assert r.ours.n >= 7
        maps = TIMED[r.op].sample(tuple(r.size), r.options, dtype=getattr(torch, r.dtype)).maps
        assert r.copy_bytes == 2 * sum(t.numel() * t.element_size() for t in maps)
        assert r.least_bytes >= r.copy_bytes // 2 * (3 if r.mode == "fwd+bwd" else 1)  # a stride leaves little to write
    assert {"torch", "python", "cpu", "threads", "date", "seed", "command", "git"} <= set(results.header)
    shown = capsys.readouterr().out
    assert "geometric means" in shown
    assert "left" in shown
    assert all(op in shown for op in TIMED)


def test_peers_are_compiled_for_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For more sizes than torch recompiles one function for before it gives up."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append([tuple(i.shape) for i in inputs])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    sizes = [(1, 4, 5, width) for width in range(3, 13)]
    file = tmp_path / "run.json"
    text = ";".join(",".join(map(str, size)) for size in sizes)
    assert run("--ops", OP, "--sizes", text, "--peers", "compile", "--mode", "fwd", "--output", str(file)) == 0
    assert [shapes[0] for shapes in compiled] == [size for size in sizes for _ in ("contiguous", "channels_last")]
    for r in Results.load(file).rows:
        assert set(r.peers) == {"compile/contiguous", "compile/channels_last"}
        assert not r.peer_errors


def test_a_peer_that_does_not_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    file = tmp_path / "run.json"
    assert run("--ops", OP, "--peers", "eager,compile", "--output", str(file), "--quiet") == 0
    for r in Results.load(file).rows:
        assert set(r.peers) == {"eager/contiguous", "eager/channels_last"}
        assert r.peer_errors["compile/contiguous"] == "RuntimeError: no C++ compiler"
    assert "compile/channels_last did not run: RuntimeError: no C++ compiler" in capsys.readouterr().out


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.001


def _raises(*args: Any, **kwargs: Any) -> Tensor:
    raise RuntimeError("cannot do it")


_reference = OPS[OP].reference
WRONG = {
    "output": (lambda *a, **k: _reference(*a, **k) * 1.001, ("fwd", "fwd+bwd"), "output: "),
    "shape": (lambda *a, **k: _reference(*a, **k)[:, :1], ("fwd", "fwd+bwd"), "[2, 1, 6, 6]"),
    "nan": (
        lambda *a, **k: _reference(*a, **k) * torch.nan,
        ("fwd", "fwd+bwd"),
        "output: 576 values not finite alike, first nan for ",
    ),
    "gradient": (lambda *a, **k: _WrongGradient.apply(_reference(*a, **k)), ("fwd+bwd",), "gradient of input 0: "),
    "error": (_raises, ("fwd", "fwd+bwd"), "RuntimeError: cannot do it"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_operation_gets_no_speed_up(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function, modes, words = WRONG[fault]
    monkeypatch.setitem(OPS, OP, dataclasses.replace(OPS[OP], op=function))
    file = tmp_path / "run.json"
    assert run("--ops", OP, "--sizes", "2,8,6,6", "--output", str(file)) == 1
    for r, stored in zip(Results.load(file).rows, json.loads(file.read_text())["rows"], strict=True):
        assert r.verified == stored["verified"] == (r.mode not in modes)
        if not r.verified:
            assert r.problem
            assert words in r.problem
            assert stored["ours"] is stored["ratio"] is stored["gbps"] is None
            assert r.peers
    assert "PARITY FAILED" in capsys.readouterr().out


def test_interruption_keeps_what_is_done(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    args = [*SMALL, "--sizes", ";".join(f"1,8,6,{w}" for w in range(1, 200)), "--output", str(file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "run", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    results = Results.load(file)
    assert process.returncode == 130
    assert 0 < len(results.rows) < results.header["planned_rows"]
    assert f"stopped after {len(results.rows)} of {results.header['planned_rows']} rows, kept in {file}" in shown
    assert "geometric means" in shown


BAD = {
    "op": (
        ["--ops", "simam,simma"],
        "--ops: expected one or more of " + ", ".join(TIMED) + " (with commas), got simma",
    ),
    "dtype": (["--dtype", "int8"], "--dtype: expected one or more of float32, float64, float16, bfloat16"),
    "layout": (["--layout", "nchw"], "--layout: expected one or more of contiguous, channels_last"),
    "mode": (["--mode", "bwd"], "--mode: expected one or more of fwd, fwd+bwd (with commas), got bwd"),
    "peers": (["--peers", "jax"], "--peers: expected one or more of eager, compile (with commas), got jax"),
    "preset": (["--preset", "slow"], "--preset: invalid choice: 'slow' (choose from"),
    "backend": (["--backend", "tpu"], "--backend: invalid choice: 'tpu' (choose from"),
    "device": (["--device", "tpu"], "--device: expected a device of cpu"),
    "device not there": (["--device", "cuda:99"], "--device: expected a device of cpu"),
    "three numbers": (
        ["--sizes", "8,64,56"],
        "--sizes: expected sizes as N,C,H,W;N,C,H,W of positive integers, got 8,64,56",
    ),
    "no numbers": (["--sizes", "1,8,6,6;a,b,c,d"], "of positive integers, got a,b,c,d"),
    "zero": (["--sizes", "0,8,6,6"], "of positive integers, got 0,8,6,6"),
    "threads": (["--threads", "0"], "--threads: expected an integer of at least 1, got 0"),
    "seconds": (["--seconds", "-1"], "--seconds: expected seconds, 0 or more, got -1"),
    "not a number": (["--seconds", "nan"], "--seconds: expected seconds, 0 or more, got nan"),
    "folder": (["--output", "no/such/folder/x.json"], "--output: expected a file in a folder that can be written to"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_with_the_allowed_values(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, words = BAD[name]
    with pytest.raises(SystemExit) as stop:
        main(["run", "--device", "cpu", "--sizes", "1,1,1,1", *args])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.empty(1, 1, 1, 1)
    backend, reason = next((b, why) for b in backends.BACKENDS[::-1] if (why := backends.why_not(OP, b, x)) is not None)
    with pytest.raises(SystemExit) as stop:
        run("--ops", OP, "--backend", backend)
    assert stop.value.code == 2
    assert f"--backend: expected one that runs {OP} on cpu, got {backend}: {reason}" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("--ops", OP) == 0
    shown = capsys.readouterr().out
    assert "benchmark" in shown
    assert "4/4" in shown
    assert "[1/4] " in shown


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert run("--device", "cuda", "--output", str(file)) == 0
    results = Results.load(file)
    assert results.header["gpu"]
    for r in results.rows:
        assert r.device == "cuda"
        assert r.graph_ratio is not None


def test_presets() -> None:
    full, quick = PRESETS["full"], PRESETS["quick"]
    assert set(quick.sizes) < set(full.sizes)
    assert set(cases.NETWORK_SIZES) < set(full.sizes)
    assert len(set(full.sizes)) == len(full.sizes)


def test_all_compute_on_the_same_values() -> None:
    """Ours, the peers in both layouts and the exact reference get one set of numbers and one gradient."""
    case = plan([OP], lambda info, options: [(2, 6, 5, 4)], [torch.bfloat16], ["fwd+bwd"], ("channels_last",), CPU)[0]
    sample = case.sample("channels_last", 3)
    for layout, format_ in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        other = convert(sample, layout)
        assert other.x.is_contiguous(memory_format=format_)
        assert all(t.requires_grad and t.is_leaf for t in other.tensors())
        for a, b in zip(sample.tensors(), other.tensors(), strict=True):
            assert torch.equal(a, b)

    def linear(x: Tensor, *parameters: Any, **options: Any) -> Tensor:
        return x * 2 + sum(t.sum() for t in parameters if isinstance(t, Tensor))

    gradients = [call(linear, s, case, 3)()[1] for s in (sample, convert(sample, "contiguous"))]
    assert torch.equal(gradients[0], case.grad(case.sample("contiguous", 3), 3) * 2)
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].std() > 1  # dense and random, times two
