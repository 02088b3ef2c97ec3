"""The classes of torch itself that are replaced."""

from convblocks.accelerate.shuffles import channel_shuffle

RULES = (channel_shuffle("FastChannelShuffle", "torch.nn.modules.channelshuffle.ChannelShuffle"),)
