// Channel attention: gate(W2 (act(W1 mean + b1) + act(W1 max + b1)) + 2 b2), mean and maximum of each plane.
#pragma once
#include "squeeze_excite.h"

namespace convblocks {

struct ChannelAttentionArgs {
  Dtype dtype;
  int64_t n, c, hw;
  SqueezeExciteWeights weights;  // of two layers
  Map x;
  void* y;  // (N, C), dense
};

// Where several pixels share the maximum its gradient is divided among them, as torch.amax does.
struct ChannelAttentionBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  SqueezeExciteWeights weights;
  const void* grad;  // (N, C), dense
  Map x;
  Map grad_x;
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2;  // shapes and dtype of the weights; null where the weight is
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_channel_attention(const convblocks::Context&,
                                                           const convblocks::ChannelAttentionArgs&);
CONVBLOCKS_KERNEL const char* convblocks_channel_attention_backward(const convblocks::Context&,
                                                                    const convblocks::ChannelAttentionBackwardArgs&);
// On the CPU only: adds to grad_x.
CONVBLOCKS_KERNEL const char* convblocks_channel_attention_backward_onto(
    const convblocks::Context&, const convblocks::ChannelAttentionBackwardArgs&);
