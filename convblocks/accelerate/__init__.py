"""Makes existing models faster in place: rules per foreign library, the pass over a model, and its report."""

from convblocks.accelerate.replace import accelerate, is_accelerated, revert
from convblocks.accelerate.report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "is_accelerated", "revert"]
