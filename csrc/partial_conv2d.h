// Partial convolution: the convolution of the first channels, and the rest passed on.
#pragma once
#include "concat_shuffle.h"
#include "dense_conv2d.h"

namespace convblocks {

struct PartialConv2dArgs {
  const DenseConv2dArgs* first;  // null: torch has convolved, and its output is one of the pieces
  ShuffleArgs pieces;            // none if all channels are convolved here
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_partial_conv2d(const convblocks::Context&,
                                                        const convblocks::PartialConv2dArgs&);
CONVBLOCKS_KERNEL const char* convblocks_partial_conv2d_backward(const convblocks::Context&,
                                                                 const convblocks::ShuffleArgs&);
