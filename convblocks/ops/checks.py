"""Input checks that several operations share. The compiled part says the same words (csrc/op.h); tests compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _size(t: Tensor) -> str:
    return str(list(t.shape))


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def feature_map(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: expected a 4-D input (N, C, H, W), got a {x.dim()}-D tensor of size {_size(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: expected an input of dtype float32, float64, float16 or bfloat16, got {_dtype(x)}")


def feature_maps(op: str, maps: Sequence[Tensor]) -> None:
    """Those that become one along their channels."""
    if len(maps) == 0:
        raise ValueError(f"{op}: expected at least one map, got an empty list")
    for t in maps:
        feature_map(op, t)
    x = maps[0]
    n, _, h, w = x.shape
    for t in maps:
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: expected maps of dtype {_dtype(x)} like the first, got {_dtype(t)}")
        if t.device != x.device:
            raise RuntimeError(f"{op}: expected maps on {x.device} like the first, got {t.device}")
        if (t.shape[0], *t.shape[2:]) != (n, h, w):
            raise ValueError(f"{op}: expected maps of size [{n}, *, {h}, {w}] like the first, got {_size(t)}")


def parameter(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """A weight or bias: on the input's device, in its dtype, or in float32 with a half-precision input."""
    if t is None:
        return
    if t.device != x.device:
        raise RuntimeError(f"{op}: expected {name} on {x.device} like the input, got {t.device}")
    if t.dtype != x.dtype:
        half = x.dtype in (torch.float16, torch.bfloat16)
        if not (half and t.dtype == torch.float32):
            allowed = f"{_dtype(x)} or float32" if half else _dtype(x)
            raise TypeError(f"{op}: expected {name} of dtype {allowed}, got {_dtype(t)}")


def one_dtype(op: str, **parameters: Tensor | None) -> None:
    given = [(name, t) for name, t in parameters.items() if t is not None]
    for name, t in given[1:]:
        if t.dtype != given[0][1].dtype:
            raise TypeError(f"{op}: expected {name} of dtype {_dtype(given[0][1])} like {given[0][0]}, got {_dtype(t)}")


def size(op: str, name: str, t: Tensor | None, ok: bool, expected: str) -> None:
    if t is not None and not ok:
        raise ValueError(f"{op}: expected {name} of size {expected}, got {_size(t)}")


def sized(op: str, name: str, t: Tensor | None, x: Tensor, expected: Sequence[int]) -> None:
    """A parameter of just this size, which may be symbolic."""
    parameter(op, name, t, x)
    if t is not None and list(t.shape) != list(expected):  # before the words: those of symbolic sizes break a graph
        size(op, name, t, False, str(list(expected)))


def vector(op: str, name: str, t: Tensor | None, length: int) -> None:
    size(op, name, t, t is not None and tuple(t.shape) == (length,), f"[{length}]")


def _is_matrix(w: Tensor, rows: int | None, columns: int) -> bool:
    shape = tuple(w.shape)
    return len(shape) in (2, 4) and shape[2:] in ((), (1, 1)) and shape[1] == columns and rows in (None, shape[0])


def matrix(op: str, name: str, w: Tensor, rows: int, columns: int) -> None:
    """The weight of a layer, as torch's linear layers have it, or its 1x1 convolutions."""
    size(op, name, w, _is_matrix(w, rows, columns), f"[{rows}, {columns}] or [{rows}, {columns}, 1, 1]")


def hidden_size(op: str, w1: Tensor, columns: int, name: str = "w1") -> int:
    """How many outputs a first layer has."""
    ok = w1.dim() > 0 and w1.shape[0] > 0 and _is_matrix(w1, None, columns)
    size(op, name, w1, ok, f"[R, {columns}] or [R, {columns}, 1, 1]")
    return w1.shape[0]


def one_of(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: expected {name} to be one of {', '.join(allowed)}, got {value}")


def like(op: str, name: str, t: Tensor | None, x: Tensor, expected: Sequence[int]) -> None:
    """A map of the input's dtype on its device: a gradient, or a second input."""
    if t is None:
        return
    if list(t.shape) != list(expected):
        size(op, name, t, False, str(list(expected)))
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: expected {name} of dtype {_dtype(x)}, got {_dtype(t)}")
    if t.device != x.device:
        raise RuntimeError(f"{op}: expected {name} on {x.device} like the input, got {t.device}")


def _overlaps(x: Tensor) -> bool:
    reach = 0  # from the first element to the last of the dimensions so far
    for stride, n in sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += (n - 1) * stride
    return False


def inplace(op: str, x: Tensor, **others: Tensor | None) -> None:
    """What writes over x, from x and the others."""
    for name, t in {"input": x, **others}.items():
        if torch.is_grad_enabled() and t is not None and t.requires_grad:
            which = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
            raise ValueError(f"{op}: expected inplace only where no gradient is wanted, got {which} that requires it")
    if _overlaps(x):
        words = f"an input whose elements share no memory, got strides {list(x.stride())} for size {_size(x)}"
        raise ValueError(f"{op}: expected inplace only for {words}")
