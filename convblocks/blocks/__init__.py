"""Attention blocks as modules: parameters and a call to an operation."""

from convblocks.blocks.convert import convert_state_dict
from convblocks.blocks.eca import ECA
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite

__all__ = ["ECA", "EffectiveSqueezeExcite", "SimAM", "SqueezeExcite", "convert_state_dict"]
