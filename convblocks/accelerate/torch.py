"""The classes of torch itself that are replaced."""

from convblocks.accelerate.convolutions import depthwise
from convblocks.accelerate.shuffles import channel_shuffle

RULES = (
    channel_shuffle("FastChannelShuffle", "torch.nn.modules.channelshuffle.ChannelShuffle"),
    depthwise("FastDepthwiseConv2d", "torch.nn.modules.conv.Conv2d", same=False),
)
