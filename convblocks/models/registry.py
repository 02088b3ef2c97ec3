"""Networks by name: a class, the options that a name stands for, and a function that builds it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from numbers import Real
from typing import Any

from convblocks.models.network import Network

_RATES = {"drop_rate", "drop_path_rate", "layer_drop_rate", "dropout"}


@dataclass(frozen=True)
class Entry:
    """A network that has a name.

    Attributes:
        name: of its function in ``convblocks.models``.
        cls: the class.
        options: of its constructor.
        image_size: height and width of the images that it was published with.
    """

    name: str
    cls: type[Network]
    options: Mapping[str, Any]
    image_size: int

    def __call__(self, *, features_only: bool = False, **options: Any) -> Network:
        for rate in _RATES & options.keys() & signature(self.cls).parameters.keys():
            value = options[rate]
            if not isinstance(value, Real) or not 0 <= float(value) < 1:
                raise ValueError(f"{self.name}: expected {rate} to be a number from 0 to below 1, got {value!r}")
        network = self.cls(**{"num_classes": 1000, "in_channels": 3, **self.options, **options})
        network.name = self.name
        return network.without_head() if features_only else network


ENTRIES: dict[str, Entry] = {}


def register(cls: type[Network], names: Mapping[str, Mapping[str, Any]], image_size: int = 224) -> None:
    """Gives a name to each set of options; an ``image_size`` among them goes before that for all."""
    for name, options in names.items():
        own = dict(options)
        size = own.pop("image_size", image_size)
        ENTRIES[name] = Entry(name, cls, own, size)


def function(entry: Entry) -> Callable[..., Network]:
    def build(**options: Any) -> Network:
        return entry(**options)

    build.__name__ = build.__qualname__ = entry.name
    build.__module__ = "convblocks.models"
    build.__doc__ = f"{entry.name}: see ``convblocks.models.create`` for the options that all networks take.\n\n"
    build.__doc__ += f"Those of its own: see ``{entry.cls.__name__}``."
    return build


def unknown(name: str) -> str:
    """What to say of a name that no network has."""
    close = difflib.get_close_matches(name, ENTRIES, 4)
    return f"expected the name of a network, got {name!r}" + (f": is it {' or '.join(close)}?" if close else "")
