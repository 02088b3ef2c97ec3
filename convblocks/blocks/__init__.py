"""Blocks as modules: parameters and a call to an operation."""

from convblocks.blocks.channel_shuffle import ChannelShuffle
from convblocks.blocks.convert import convert_state_dict
from convblocks.blocks.eca import ECA
from convblocks.blocks.simam import SimAM
from convblocks.blocks.squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite

__all__ = ["ECA", "ChannelShuffle", "EffectiveSqueezeExcite", "SimAM", "SqueezeExcite", "convert_state_dict"]
