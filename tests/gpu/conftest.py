"""Triton's interpreter must be chosen before triton is imported, and then nothing can be compiled: two processes."""

import os

collect_ignore_glob = (
    ["test_emulator.py", "test_cuda.py", "test_compile.py"]
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ["test_triton_*.py"]
)
