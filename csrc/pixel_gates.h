// What CBAM makes of the pooled planes at inference: gates of the pixels from a convolution to one plane.
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

struct PixelGatesArgs {
  Dtype dtype;  // of all: f32 or f64
  int64_t n, planes, h, w, kernel;
  const void* weight;         // (planes, kernel, kernel), dense, with an odd kernel
  const void *scale, *shift;  // one number each, or null: 1 and 0
  Gate gate;
  Map x;
  void* y;  // (N, H * W), dense
};

}  // namespace convblocks

// Only in the shared objects of the CPU.
CONVBLOCKS_KERNEL const char* convblocks_pixel_gates(const convblocks::Context&, const convblocks::PixelGatesArgs&);
