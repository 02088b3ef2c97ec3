// Efficient channel attention: y = x * gate(conv1d_k(mean(x)) + bias), one k-tap filter sliding over the channels.
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

struct EcaWeights {
  Dtype dtype;         // that of the map, or f32
  int64_t kernel;      // k, odd
  const void* weight;  // (k)
  const void* bias;    // (1), or null
  Gate gate;
  bool circular;  // pad with the channels from the other end instead of zeros; then (k - 1) / 2 <= C
};

struct EcaArgs {
  Dtype dtype;
  int64_t n, c, hw;
  EcaWeights weights;
  Map x;
  Map y;  // x's layout, dense
};

// Recomputes the mean in the pass over x that the gradient of the gate needs: nothing but x is kept.
struct EcaBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  EcaWeights weights;
  Map grad;  // same kind of layout as x
  Map x;
  Map grad_x;
  void *grad_weight, *grad_bias;  // dtype of the weight; grad_bias null where bias is
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_eca(const convblocks::Context&, const convblocks::EcaArgs&);
CONVBLOCKS_KERNEL const char* convblocks_eca_backward(const convblocks::Context&, const convblocks::EcaBackwardArgs&);
