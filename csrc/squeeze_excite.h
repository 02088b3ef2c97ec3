// Squeeze-and-excitation: y = x * gate(W2 act(W1 p + b1) + b2), p = mean(x) over each plane, or (mean(x) + max(x)) / 2.
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

// Weights are dense and row-major. reduced == 0: one layer, y = x * gate(W2 p + b2) with W2 (C, C) and w1, b1 null.
struct SqueezeExciteWeights {
  Dtype dtype;  // that of the map, or f32
  int64_t reduced;
  const void* w1;  // (R, C)
  const void* b1;  // (R), or null
  const void* w2;  // (C, R)
  const void* b2;  // (C), or null
  Activation activation;
  Gate gate;
  bool add_maxpool;
};

struct SqueezeExciteArgs {
  Dtype dtype;
  int64_t n, c, hw;
  SqueezeExciteWeights weights;
  Map x;
  Map y;  // x's layout, dense
};

// Recomputes the squeeze in the pass over x that the gradient of the gate needs: nothing but x is kept.
// Where several pixels share the maximum its gradient is divided among them, as torch.amax does.
struct SqueezeExciteBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  SqueezeExciteWeights weights;
  Map grad;  // same kind of layout as x
  Map x;
  Map grad_x;
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2;  // shapes and dtype of the weights; null where the weight is
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_squeeze_excite(const convblocks::Context&,
                                                        const convblocks::SqueezeExciteArgs&);
CONVBLOCKS_KERNEL const char* convblocks_squeeze_excite_backward(const convblocks::Context&,
                                                                 const convblocks::SqueezeExciteBackwardArgs&);
