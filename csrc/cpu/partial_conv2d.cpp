// Partial convolution on the CPU: the convolution is dense_conv2d's, or torch's, and the rest is that of concat_shuffle.
#include "../partial_conv2d.h"

const char* convblocks_partial_conv2d(const convblocks::Context& context, const convblocks::PartialConv2dArgs& args) {
  const char* error = args.first ? convblocks_dense_conv2d(context, *args.first) : nullptr;
  return error || !args.pieces.count ? error : convblocks_concat_shuffle(context, args.pieces);
}
const char* convblocks_partial_conv2d_backward(const convblocks::Context& context,
                                               const convblocks::ShuffleArgs& args) {
  return convblocks_concat_shuffle(context, args);
}
