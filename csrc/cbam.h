// The convolutional block attention module at inference: y = x * channel[c] * pixel[p], and x more with the residual.
#pragma once
#include "pixel_gates.h"
#include "squeeze_excite.h"

namespace convblocks {

struct CbamArgs {
  Dtype dtype;  // of all: f32 or f64
  int64_t n, c, h, w;
  SqueezeExciteWeights weights;  // of two layers
  PixelKernel kernel;            // of two planes, means and maxima
  bool residual;
  Map x;
  Map y;  // x's layout, dense
};

}  // namespace convblocks

// Only in the shared objects of the CPU.
CONVBLOCKS_KERNEL const char* convblocks_cbam(const convblocks::Context&, const convblocks::CbamArgs&);
