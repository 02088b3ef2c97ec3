"""The classes of torch itself that are replaced."""

from convblocks.accelerate.convolutions import depthwise

RULES = (depthwise("FastDepthwiseConv2d", "torch.nn.modules.conv.Conv2d", same=False),)
