"""Benchmarks of the operations in ``convblocks.opinfo`` against plain torch (``python -m bench --help``)."""
