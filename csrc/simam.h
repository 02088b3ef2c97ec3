// SimAM: y = x * sigmoid(d^2 / (4 (v + lambda)) + 1/2), with d = x - mean and v = sum(d^2) / (HW - 1) over each plane.
#pragma once
#include "kernel.h"

namespace convblocks {

struct SimamArgs {
  Dtype dtype;
  int64_t n, c, hw;
  double e_lambda;
  Map x;
  Map y;  // x's layout, dense
};

// Recomputes mean and variance from x, which it has to read anyway: nothing but x is kept for the backward.
struct SimamBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  double e_lambda;
  Map grad;  // same kind of layout as x
  Map x;
  Map grad_x;
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_simam(const convblocks::Context&, const convblocks::SimamArgs&);
CONVBLOCKS_KERNEL const char* convblocks_simam_backward(const convblocks::Context&,
                                                        const convblocks::SimamBackwardArgs&);
