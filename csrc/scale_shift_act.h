// Batch norm at inference with what follows it: y = activation(x * scale[c] + shift[c] + residual).
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

struct ScaleShift {
  Dtype dtype;                // that of the map, or f32
  const void *scale, *shift;  // (C)
};

struct ScaleShiftActArgs {
  Dtype dtype;
  int64_t n, c, hw;
  ScaleShift channels;
  Activation activation;
  Map x;
  Map residual;  // same kind of layout as x; data is null where there is none
  Map y;         // same kind of layout as x; or x itself
};

// Computes what the activation was given again, from inputs that it has to read anyway.
struct ScaleShiftActBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  ScaleShift channels;
  Activation activation;
  Map grad, x, residual;  // same kind of layout
  Map grad_x;             // x's layout, dense
  Map grad_residual;      // the same; data is null where residual's is
  void *grad_scale, *grad_shift;
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_scale_shift_act(const convblocks::Context&,
                                                         const convblocks::ScaleShiftActArgs&);
CONVBLOCKS_KERNEL const char* convblocks_scale_shift_act_backward(const convblocks::Context&,
                                                                  const convblocks::ScaleShiftActBackwardArgs&);
