// Mean and maximum over the channels of each pixel, of x * channel[c].
#pragma once
#include "kernel.h"

namespace convblocks {

struct ChannelPoolArgs {
  Dtype dtype;
  int64_t n, c, hw;
  Dtype gate_dtype;     // that of the map, or f32
  const void* channel;  // (N, C), dense; null: ones
  Map x;
  Map y;  // (N, 2, HW): means, maxima; same kind of layout as x
  // Null, or for what the backward takes: the maxima (N, HW), and how many channels have them (N, HW).
  void* memory;
};

// Where several channels share the maximum its gradient is divided among them, as torch.amax does.
struct ChannelPoolBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  Dtype gate_dtype;
  const void* channel;
  Map grad;  // (N, 2, HW); same kind of layout as x
  Map x;
  Map grad_x;
  const void* memory;  // null: to be computed again
  void* grad_channel;  // null where channel is
};

}  // namespace convblocks

// In the shared objects whose kernels keep a memory and take it: those of the CPU.
CONVBLOCKS_KERNEL const bool convblocks_channel_pool_remembers;
CONVBLOCKS_KERNEL const char* convblocks_channel_pool(const convblocks::Context&, const convblocks::ChannelPoolArgs&);
CONVBLOCKS_KERNEL const char* convblocks_channel_pool_backward(const convblocks::Context&,
                                                               const convblocks::ChannelPoolBackwardArgs&);
// On the CPU only: adds to grad_x.
CONVBLOCKS_KERNEL const char* convblocks_channel_pool_backward_onto(const convblocks::Context&,
                                                                    const convblocks::ChannelPoolBackwardArgs&);
