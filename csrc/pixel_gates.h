// What CBAM makes of the pooled planes at inference: gates of the pixels from a convolution to one plane.
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

struct PixelKernel {
  int64_t size;               // odd
  const void* weight;         // (planes, size, size), dense
  const void *scale, *shift;  // one number each, or null: 1 and 0
  Gate gate;
};

struct PixelGatesArgs {
  Dtype dtype;  // of all: f32 or f64
  int64_t n, planes, h, w;
  PixelKernel kernel;
  Map x;
  void* y;  // (N, H * W), dense
};

}  // namespace convblocks

// Only in the shared objects of the CPU.
CONVBLOCKS_KERNEL const char* convblocks_pixel_gates(const convblocks::Context&, const convblocks::PixelGatesArgs&);
