// Depthwise convolution: y[c * m + j] = activation(x[c] * weight[c * m + j] + bias[c * m + j]), for j < m; one filter of
// one channel for each channel of y. Pixels outside the map count as zeros and are never read.
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

struct DepthwiseConv2dShape {
  int64_t n, c, multiplier;  // c channels of x, c * multiplier of y
  int64_t h, w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t top, left;  // padding; what is beyond bottom and right follows from the sizes
};

struct DepthwiseConv2dWeights {
  Dtype dtype;
  const void* weight;  // (c * multiplier, kernel_h, kernel_w)
  const void* bias;    // (c * multiplier), or null
  Activation activation;
};

struct DepthwiseConv2dArgs {
  Dtype dtype;
  DepthwiseConv2dShape shape;
  DepthwiseConv2dWeights weights;
  Map x;
  Map y;       // x's layout, dense
  void* sums;  // of the pixels of each plane of y, (n, c * multiplier) as the sums are computed; or null
};

struct DepthwiseConv2dBackwardArgs {
  Dtype dtype;
  DepthwiseConv2dShape shape;
  DepthwiseConv2dWeights weights;
  Map grad, x;
  Map grad_x;  // x's layout, dense
  void* grad_weight;
  void* grad_bias;  // or null
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_depthwise_conv2d(const convblocks::Context&,
                                                          const convblocks::DepthwiseConv2dArgs&);
CONVBLOCKS_KERNEL const char* convblocks_depthwise_conv2d_backward(const convblocks::Context&,
                                                                   const convblocks::DepthwiseConv2dBackwardArgs&);
