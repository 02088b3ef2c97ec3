// Partial convolution: what torch's convolution made of the first channels, then the other channels as they are. The
// kernel puts them together: concat_shuffle of the two with one group. So it does with their gradients.
#pragma once
#include "concat_shuffle.h"

CONVBLOCKS_KERNEL const char* convblocks_partial_conv2d(const convblocks::Context&, const convblocks::ShuffleArgs&);
CONVBLOCKS_KERNEL const char* convblocks_partial_conv2d_backward(const convblocks::Context&,
                                                                 const convblocks::ShuffleArgs&);
