"""When a block may run its layers as one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether calling a layer does what its class does, and nothing else: no hooks, no forward of its own."""
    if type(layer) is not kind:
        return False
    attributes = layer.__dict__
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def fusible(x: Tensor, kind: type[nn.Module], *layers: Any) -> bool:
    """Whether calling the layers does what torch's ``kind`` does, in a dtype that the operation takes with x.

    Not if a layer is of a class of its own (wrapped, parametrized, quantised), has a forward or hooks of its own, or
    computes its parameters (pruned, weight norm). Everything is read from dictionaries: an attribute of a module costs
    as much as half an operation.
    """
    traced = isinstance(x, torch.fx.Proxy)  # a name in a graph: its dtype is not known
    half = not traced and x.dtype in (torch.float16, torch.bfloat16)
    for layer in layers:
        if not is_plain(layer, kind):
            return False
        parameters = layer.__dict__["_parameters"]
        if "weight" not in parameters or "bias" not in parameters:
            return False
        dtype = parameters["weight"].dtype
        if not traced and dtype != x.dtype and not (half and dtype == torch.float32):
            return False
    if not half:
        return True
    device = x.device.type
    return not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype)
