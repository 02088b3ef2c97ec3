"""What can run an operation here, and why not: the compiled part, its CPU and CUDA kernels, Triton, and the choice.

The operators live in the dispatcher (``torch.ops.convblocks``). ``_C`` gives them gradients, transforms and the C++
kernels of the device; Triton kernels take the device's place in the dispatcher while they are chosen. ``auto`` is
whatever stands there; a backend asked for by name runs or raises with the reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from convblocks.ops.operator import Operator

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

_package = Path(__file__).parent
operators: dict[str, Operator] = {}
stale: set[str] = set()  # operations that the compiled part, older than these sources, lacks
selected = "auto"
extension_error: str | None = "not loaded yet"
kernel_errors: dict[str, str | None] = {"cpu": "not loaded yet", "cuda": "not loaded yet"}
cpu_isa: str | None = None


def build_record() -> dict[str, Any]:
    """What the build of the compiled part noted: versions, flags, and why a part was left out."""
    file = _package / "_build_info.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return record


def _shared_object(name: str) -> Path:
    return _package / f"{name}.so"


def _missing(name: str) -> str:
    reason = build_record().get("missing", {}).get(name)
    return reason or f"{_shared_object(name).name} is not built (python setup.py build_ext --inplace)"


def load_extension() -> None:
    """Loads the compiled part once and notes why it, or a part of it, is not there."""
    global extension_error, cpu_isa
    if extension_error != "not loaded yet":
        return
    if os.environ.get("CONVBLOCKS_BUILD") == "0":
        extension_error = "CONVBLOCKS_BUILD=0"
    elif not _shared_object("_C").exists():
        extension_error = _missing("_C")
    else:
        try:
            torch.ops.load_library(str(_shared_object("_C")))
            extension_error = None
        except OSError as e:
            built = build_record().get("torch", "unknown")
            extension_error = f"_C was built for torch {built} and does not load with {torch.__version__}: {e}"
    if extension_error is not None:
        kernel_errors.update(cpu=extension_error, cuda=extension_error)
        return
    capability = torch.backends.cpu.get_cpu_capability().lower()
    for isa in dict.fromkeys((capability, "avx2" if capability == "avx512" else "default", "default")):
        kernel_errors["cpu"] = load_kernels(_shared_object(f"_cpu_{isa}"), "cpu")
        if kernel_errors["cpu"] is None:
            cpu_isa = isa
            break
    kernel_errors["cuda"] = (
        load_kernels(_shared_object("_cuda"), "cuda") if torch.version.cuda else "torch is built without CUDA"
    )


def load_kernels(file: Path, device: str) -> str | None:
    """Makes the kernels in ``file`` those of ``device``; returns why not, or None."""
    if not file.exists():
        return _missing(file.stem)
    try:
        torch.ops.convblocks._load_kernels(str(file), device)
    except RuntimeError as e:
        return str(e).splitlines()[0]
    return None


def register(operator: Operator) -> None:
    operators[operator.name] = operator
    if operator.name in stale:
        return
    if kernel_errors["cuda"] is not None and extension_error is None and torch.version.cuda:
        _triton.register(operator.name, "CUDA")  # the kernels of the device where no CUDA kernels are built


class _Triton:
    """Puts Triton kernels in the place of a device's kernels in the dispatcher, and takes them out again."""

    def __init__(self) -> None:
        self._lasting = torch.library.Library("convblocks", "IMPL")
        self._taken: torch.library.Library | None = None

    def device(self) -> str:
        """The dispatch key that Triton serves here: CPU under its interpreter, else CUDA."""
        return "CPU" if os.environ.get("TRITON_INTERPRET") == "1" else "CUDA"

    def why_not(self) -> str | None:
        if extension_error is not None:
            return f"its operators need the compiled part: {extension_error}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None

    def register(self, name: str, key: str, library: torch.library.Library | None = None) -> None:
        def kernel(suffix: str) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                operator = operators[name]
                module = importlib.import_module(f"convblocks.kernels.{operator.variant_of or name}")
                (operator.check_backward if suffix == "_backward" else operator.check)(*args)
                return getattr(module, f"{name}{suffix}")(*args)

            return run

        library = library or self._lasting
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
            suffixes = ["", "_backward"]
            if operators[name].variant_of:
                suffixes = [""]
            elif operators[name].inplace:
                suffixes.append("_")
            for suffix in suffixes:
                library.impl(f"{name}{suffix}", kernel(suffix), key)

    def take_place(self, wanted: bool) -> None:
        """Of the device's kernels, while it is wanted."""
        if wanted and self._taken is None:
            self._taken = torch.library.Library("convblocks", "IMPL")
            for name in operators.keys() - stale:
                self.register(name, self.device(), self._taken)
        elif not wanted and self._taken is not None:
            self._taken._destroy()
            self._taken = None


_triton = _Triton()
_emulated_cuda = False


def emulate_cuda(file: Path) -> None:
    """For the tests: CUDA kernels compiled for the CPU take the place of the CPU kernels in this process."""
    global _emulated_cuda
    torch.ops.convblocks._load_kernels(str(file), "cpu")
    _emulated_cuda = True


def why_not(op: str, backend: str, x: Tensor | None = None) -> str | None:
    """Why ``backend`` cannot run ``op`` (on x, or at all), or None if it can."""
    _known(backend)
    if op not in operators:
        raise ValueError(f"convblocks: expected an operation of {', '.join(operators)}, got {op}")
    if backend in ("auto", "reference"):
        return None
    if op in stale:
        return f"{_shared_object('_C').name} is of other sources, without {op}: build it again"
    if backend == "triton":
        reason, device = _triton.why_not(), _triton.device().lower()
    elif backend == "cuda" and _emulated_cuda:
        reason, device = None, "cpu"
    else:
        reason = "the emulated CUDA kernels took its place" if _emulated_cuda else kernel_errors[backend]
        device = backend
    if reason is not None:
        return reason
    if x is None:
        return None if device == "cpu" or torch.cuda.is_available() else "torch sees no CUDA device"
    if x.device.type not in (device, "meta"):
        hint = " (TRITON_INTERPRET=1 runs it on the CPU, slowly)" if backend == "triton" else ""
        return f"it runs on {device}, the input is on {x.device}{hint}"
    return None


def which(op: str, x: Tensor) -> str:
    """The backend that runs ``op`` on x now: the selected one, or the one ``auto`` takes."""
    if selected != "auto":
        return selected
    if x.is_meta:
        return "reference"  # which says the sizes; nothing runs
    order = ("cpu", "cuda", "triton") if x.device.type == "cuda" else ("cpu", "cuda")
    return next((b for b in order if why_not(op, b, x) is None), "reference")


def _known(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"convblocks: expected a backend of {', '.join(BACKENDS)}, got {name}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside on one backend: "auto", "reference", "cpu", "triton" or "cuda".

    A named backend that cannot run an input raises with the reason instead of falling back. The choice holds for the
    whole process while the context is open, gradients included. ``CONVBLOCKS_BACKEND`` makes it for a whole run.

    Raises:
        ValueError: an unknown name.
        RuntimeError: from an operation inside, if the backend cannot run it.

    Example:
        >>> with convblocks.use_backend("reference"):
        ...     y = convblocks.ops.simam(torch.randn(2, 8, 7, 7))
    """
    _known(name)
    context = object()
    _open[context] = name
    try:
        _select()
        yield
    finally:
        del _open[context]
        _select()


_open: dict[object, str] = {}  # the contexts, whichever thread has opened them; the last one counts


def _select() -> None:
    global selected
    selected = next(reversed(_open.values()), "auto")
    _triton.take_place(selected == "triton" and _triton.why_not() is None)


_environment = object()  # stands for the choice of CONVBLOCKS_BACKEND, which holds for the life of the process


def select_from_environment() -> None:
    name = os.environ.get("CONVBLOCKS_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"CONVBLOCKS_BACKEND: expected a backend of {', '.join(BACKENDS)}, got {name}")
    if name != "auto":
        _open[_environment] = name
        _select()
