"""The Triton kernels of every operation, under the checker: faults, accuracy, bytes moved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import convblocks
from convblocks import backends
from convblocks.opinfo import OpInfo, Options, Size
from tests.gpu import triton_checker
from tests.gpu.proof import each_case, each_traffic, prove, prove_traffic

triton_checker.install()


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    reason = backends.extension_error
    if reason is not None:
        pytest.skip(reason)
    with convblocks.use_backend("triton"):
        yield


@each_case
def test_faults_and_accuracy(info: OpInfo, options: Options, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    start = info.options.index(options) + dtype.itemsize
    prove(info, options, dtype, parameter_dtype, triton_checker.watch, start)


@each_traffic
def test_traffic(info: OpInfo, size: Size, dtype: torch.dtype, layout: str, backward: bool) -> None:
    prove_traffic(info, size, dtype, layout, backward, triton_checker.watch)
