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
  // Null, or for what the backward takes. Of each sample, one array after the other: mean and maximum of each channel (2 C),
  // what the first layer makes of each (2 R) and the sum of both activated (R), the logits (C), and how many pixels have
  // the maximum (C).
  void* memory;
};

// Where several pixels share the maximum its gradient is divided among them, as torch.amax does.
struct ChannelAttentionBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  SqueezeExciteWeights weights;
  const void* grad;  // (N, C), dense
  Map x;
  Map grad_x;
  const void* memory;                           // null: to be computed again
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2;  // shapes and dtype of the weights; null where the weight is
};

}  // namespace convblocks

// In the shared objects whose kernels keep a memory and take it: those of the CPU.
CONVBLOCKS_KERNEL const bool convblocks_channel_attention_remembers;
CONVBLOCKS_KERNEL const char* convblocks_channel_attention(const convblocks::Context&,
                                                           const convblocks::ChannelAttentionArgs&);
CONVBLOCKS_KERNEL const char* convblocks_channel_attention_backward(const convblocks::Context&,
                                                                    const convblocks::ChannelAttentionBackwardArgs&);
// On the CPU only: adds to grad_x.
CONVBLOCKS_KERNEL const char* convblocks_channel_attention_backward_onto(
    const convblocks::Context&, const convblocks::ChannelAttentionBackwardArgs&);
