"""GPU code proven on a machine without a GPU. Everything here runs over the records of convblocks/opinfo.

Triton, under its interpreter (TRITON_INTERPRET=1, a process of its own):
    triton_checker.py    bounds, races between programs, undefined lanes, bytes moved; bf16 as a GPU computes it
    test_triton_ops.py   every operation under it: forward and backward, each option, dtype and layout
CUDA, compiled by g++ with a header that stands in for CUDA:
    cuda_cpu.h           what a .cu file includes; runtime.cpp runs its threads as fibers
    memory.cpp           bounds, races by CUDA's rules, bytes moved
    emulator.py          builds csrc/cuda in the variants plain, asan and memory, and talks to the runtime
    test_cuda.py         every operation in memory, and if slow tests are asked for in asan, in random order of threads
Machine code:
    test_compile.py      Triton and nvcc for sm_80 to sm_120: no spilled registers, 16-byte loads and stores
The checkers themselves:
    test_triton_checker.py, test_emulator.py (faults.cu), test_compile.py: planted faults that they must find, and clean
    kernels in which they must find none

A new operation gets all of this without a line here. It needs its record, with ``gpu_traffic`` (how many times
``least_bytes`` its kernels may move, forward and backward); kernels/<op>.py with ``<op>`` and ``<op>_backward`` that
take the operands of the dispatcher operators; csrc/cuda/<op>.cu that includes cuda.h and launches by CB_LAUNCH. What a
kernel needs of CUDA and cuda_cpu.h lacks is added there.

    TRITON_INTERPRET=1 pytest tests/gpu
    pytest tests/gpu
"""
