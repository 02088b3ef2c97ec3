// Partial convolution: the convolution is torch's, the rest is that of concat_shuffle.
#include "../partial_conv2d.h"

const char* convblocks_partial_conv2d(const convblocks::Context& context, const convblocks::PartialConv2dArgs& args) {
  return convblocks_concat_shuffle(context, args.pieces);
}
const char* convblocks_partial_conv2d_backward(const convblocks::Context& context,
                                               const convblocks::ShuffleArgs& args) {
  return convblocks_concat_shuffle(context, args);
}
