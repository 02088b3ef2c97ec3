// Concurrent spatial and channel squeeze-and-excitation: s, a gate per channel, is that of squeeze-and-excitation with
// relu and sigmoid; q = sigmoid(w . x + b) is a gate per pixel; and x s is combined with x q.
#pragma once
#include "squeeze_excite.h"

namespace convblocks {

enum class Combine : int32_t { add, max, mul, concat, spatial };  // spatial: x q alone, without channel gates

struct ScseArgs {
  Dtype dtype;
  int64_t n, c, hw;
  Combine combine;
  SqueezeExciteWeights channel;  // where there are channel gates; the dtype is that of w and b, too
  const void* w;                 // (C)
  const void* b;                 // (1), or null
  Map x;
  Map y;          // x's layout, dense; the first half of the channels for concat,
  Map y_spatial;  // and the second one
};

// Keeps nothing but x. What the gradients of the gates need of the other gate (max, mul) costs one more read of x.
struct ScseBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  Combine combine;
  SqueezeExciteWeights channel;
  const void *w, *b;
  Map grad;          // that of x s for concat, else of the whole
  Map grad_spatial;  // that of x q for concat, else the same
  Map x;
  Map grad_x;
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2, *grad_w, *grad_b;  // dtype of the weights; null where the weight is
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_scse(const convblocks::Context&, const convblocks::ScseArgs&);
CONVBLOCKS_KERNEL const char* convblocks_scse_backward(const convblocks::Context&, const convblocks::ScseBackwardArgs&);
