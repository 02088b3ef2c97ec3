"""Networks out of the blocks of this package: ``convblocks.models.resnet50(num_classes=10, attention="eca")``.

``create`` builds one by name, ``names`` lists them. All take ``num_classes`` (0: the pooled features), ``in_channels``,
``features_only`` (the map at the end of each stage, a list, instead of classes) and the options of their class.
``convblocks.convert_state_dict(sd, model=model)`` reads the weights of others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convblocks.models import (  # noqa: F401  (they register their networks)
    darknet,
    deeplab,
    densenet,
    efficientnets,
    fasternet,
    ghostnets,
    inception,
    inception_resnet,
    inceptions_v4,
    mobilenets,
    parnet,
    res2net,
    resnet,
    shufflenet,
    squeezenet,
    unets,
    vgg,
    xceptions,
)
from convblocks.models.network import Network
from convblocks.models.registry import ENTRIES, function, unknown

__all__ = ["Network", "create", "names"]


def create(name: str, **options: Any) -> Network:
    """Builds a network by name.

    Args:
        name: one of ``convblocks.models.names()``.
        **options: ``num_classes``, 1000 if not given (0: the pooled features), ``in_channels`` (3), ``features_only``
            (return the map at the end of each stage), and those of the network's class, such as ``attention``,
            ``drop_rate`` and ``drop_path_rate``.

    Raises:
        ValueError: an unknown name, options out of range.
        TypeError: a name that is no string, an option that the network does not have.

    Example:
        >>> model = convblocks.models.create("resnet18", num_classes=10, attention="simam")
    """
    if not isinstance(name, str):
        raise TypeError(f"create: expected the name of a network, got {name!r}")
    if name not in ENTRIES:
        raise ValueError(f"create: {unknown(name)}")
    return ENTRIES[name](**options)


def names(pattern: str = "") -> list[str]:
    """The names of all networks, or of those that contain ``pattern``."""
    return [name for name in ENTRIES if pattern in name]


def __getattr__(name: str) -> Callable[..., Network]:
    if name not in ENTRIES:
        raise AttributeError(f"module 'convblocks.models': {unknown(name)}")
    globals()[name] = function(ENTRIES[name])  # the same function the next time, so that it can be pickled
    made: Callable[..., Network] = globals()[name]
    return made


def __dir__() -> list[str]:
    return sorted({*globals(), *ENTRIES})
