"""Attention by name, for the blocks and networks into which any can be plugged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakSet

from torch import nn

from convblocks.blocks.cbam import CBAM
from convblocks.blocks.eca import ECA
from convblocks.blocks.global_context import GlobalContext
from convblocks.blocks.scse import SCSE, ChannelSE, SpatialSE
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite

Factory = Callable[[int], nn.Module]  # from channels
Attention = str | Factory | None

ATTENTIONS: dict[str, Factory] = {
    "se": SqueezeExcite,
    "ese": EffectiveSqueezeExcite,
    "eca": ECA,
    "cbam": CBAM,
    "cse": ChannelSE,
    "sse": SpatialSE,
    "scse": SCSE,
    "gc": GlobalContext,
    "simam": SimAM,
}


_MADE: WeakSet[nn.Module] = WeakSet()  # that start as they say themselves


def outside_attention(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it, but for attention, whose first weights are its own affair. Squeeze-excite's are those of
    the network in the published ones."""
    if module not in _MADE:
        yield module
        for child in module.children():
            yield from outside_attention(child)


def attention_layer(block: str, attention: Attention, channels: int) -> nn.Module | None:
    """What ``attention`` makes for so many channels; None of None."""
    if attention is None:
        return None
    if isinstance(attention, str):
        if attention not in ATTENTIONS:
            allowed = ", ".join(ATTENTIONS)
            raise ValueError(f"{block}: expected attention to be one of {allowed}, got {attention}")
        attention = ATTENTIONS[attention]
    layer = attention(channels) if callable(attention) and not isinstance(attention, nn.Module) else attention
    if layer is attention or not isinstance(layer, nn.Module):
        raise TypeError(
            f"{block}: expected attention to be a name or what makes a module for C channels, got {layer!r}"
        )
    if type(layer) is not SqueezeExcite:
        _MADE.add(layer)
    return layer
