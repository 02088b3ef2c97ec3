"""State dicts from files: tensors only, no code of the file's is run."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts store it beside other things


def read_state_dict(file: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The state dict in a file of torch.save (read with ``weights_only=True``) or of safetensors, on the CPU."""
    path = Path(file)
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as e:
            raise ImportError(
                f"convert_state_dict: expected safetensors, to read {path} (pip install safetensors)"
            ) from e
        try:
            tensors: Mapping[str, Any] = load_file(path)
        except SafetensorError as e:
            raise ValueError(f"convert_state_dict: expected a file of safetensors, got {path}: {e}") from e
        return tensors
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, RuntimeError, struct.error) as e:
        raise ValueError(f"convert_state_dict: expected a file of tensors only, got {path}: {e}") from e
    if not isinstance(content, Mapping):
        raise TypeError(f"convert_state_dict: expected a state dict in {path}, got {type(content).__name__}")
    inside = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
    return inside[0] if len(inside) == 1 else content
