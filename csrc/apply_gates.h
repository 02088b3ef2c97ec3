// Gates of the channels and of the pixels: y = x * channel[c] * spatial[p], and x more.
#pragma once
#include "kernel.h"

namespace convblocks {

// Dense, of one dtype; null where there is none, but not both.
struct Gates {
  Dtype dtype;          // that of the map, or f32
  const void* channel;  // (N, C)
  const void* spatial;  // (N, HW)
  bool residual;
};

struct ApplyGatesArgs {
  Dtype dtype;
  int64_t n, c, hw;
  Gates gates;
  Map x;
  Map y;  // x's layout, dense
};

struct ApplyGatesBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  Gates gates;
  Map grad;  // same kind of layout as x
  Map x;
  Map grad_x;
  void *grad_channel, *grad_spatial;  // shapes and dtype of the gates; null where those are
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_apply_gates(const convblocks::Context&, const convblocks::ApplyGatesArgs&);
CONVBLOCKS_KERNEL const char* convblocks_apply_gates_backward(const convblocks::Context&,
                                                              const convblocks::ApplyGatesBackwardArgs&);
