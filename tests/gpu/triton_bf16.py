"""bfloat16 in Triton's interpreter as a GPU computes it.

The interpreter keeps bf16 as uint16 and lets numpy add and multiply the bit patterns; its casts truncate. Here bf16
values are widened to float32, computed, and rounded to nearest even. Reductions and scans round once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_COMPARISONS = {np.less, np.greater, np.less_equal, np.greater_equal, np.equal, np.not_equal}


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def _narrow(values: np.ndarray) -> TensorHandle:
    return TensorHandle(round_to_bf16(values), tl.bfloat16)


def _patch(name: str, make: Callable[[Any], Any]) -> None:
    setattr(InterpreterBuilder, name, make(getattr(InterpreterBuilder, name)))


def _binary(original: Any) -> Any:
    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not is_bf16(lhs):
            return original(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        return TensorHandle(result, tl.int1) if op in _COMPARISONS else _narrow(result)

    return binary_op


def _unary(original: Any) -> Any:
    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        return _narrow(op(widen(arg.data))) if is_bf16(arg) else original(self, arg, op)

    return unary_op


def _ternary(original: Any) -> Any:
    def ternary_op(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, op: Any) -> TensorHandle:
        if is_bf16(c) and op is not np.where:  # a choice works on the bits
            return _narrow(op(widen(a.data), widen(b.data), widen(c.data)))
        return original(self, a, b, c, op)

    return ternary_op


def _fma(original: Any) -> Any:
    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if is_bf16(z):
            return _narrow(widen(x.data) * widen(y.data) + widen(z.data))
        return original(self, x, y, z)

    return create_fma


def _cast(original: Any) -> Any:
    def cast(self: Any, src: TensorHandle, dst_type: Any, *rounding_mode: Any) -> TensorHandle:
        target = dst_type.scalar
        if is_bf16(src):
            return src if target == tl.bfloat16 else InterpreterBuilder.cast_impl(self, _wide(src), dst_type)
        if target == tl.bfloat16:
            return _narrow(src.data)
        return original(self, src, dst_type, *rounding_mode)

    return cast


def _dot(original: Any) -> Any:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _wide(a), _wide(b), *rest)

    return create_dot


def _reduction(original: Any) -> Any:
    def in_float32(t: tl.tensor) -> tl.tensor:
        wide = _wide(t.handle)
        return tl.tensor(wide, tl.block_type(tl.float32, t.type.shape)) if wide is not t.handle else t

    def in_bf16(t: tl.tensor) -> tl.tensor:
        if t.handle.dtype.scalar != tl.float32:
            return t
        kind = tl.block_type(tl.bfloat16, t.type.shape) if t.type.is_block() else tl.bfloat16
        return tl.tensor(_narrow(t.handle.data), kind)

    def apply_impl(self: Any, input: tuple[tl.tensor, ...]) -> Any:
        if not any(is_bf16(t.handle) for t in input):
            return original(self, input)
        result = original(self, tuple(map(in_float32, input)))
        return [in_bf16(t) for t in result] if isinstance(result, (tuple, list)) else in_bf16(result)

    return apply_impl


def install() -> None:
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(np.array([value]))  # constants; the interpreter has none
    for name, make in {
        "binary_op": _binary,
        "unary_op": _unary,
        "ternary_op": _ternary,
        "create_fma": _fma,
        "create_dot": _dot,
        "cast_impl": _cast,
        "create_fp_to_fp": _cast,
    }.items():
        _patch(name, make)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = _reduction(operation.apply_impl)
