// Dense convolution with what follows it at inference: y = activation(conv(x, weight) * scale[o] + shift[o] + residual).
#pragma once
#include "scale_shift_act.h"

namespace convblocks {

struct DenseConv2dArgs {
  const ScaleShiftActArgs* after;  // not null: torch has convolved, and what follows is left; all else is not set
  Dtype dtype;                     // of all: f32 or f64
  int64_t n, c, h, w, out_c, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;
  const void* weight;         // (out_c, c, kernel_h, kernel_w), dense
  bool weight_channels_last;  // its memory is (out_c, kernel_h, kernel_w, c)
  const void *scale, *shift;  // (out_c), or null: 1 and 0
  Activation activation;
  bool planes;         // the maps' memory: planes, with a dilation_w of 1, or else channels_last
  Map x, residual, y;  // residual's data is null where there is none
};

}  // namespace convblocks

// In the shared objects whose dense_conv2d convolves itself: those of the CPU.
CONVBLOCKS_KERNEL const bool convblocks_convolves;
CONVBLOCKS_KERNEL const char* convblocks_dense_conv2d(const convblocks::Context&, const convblocks::DenseConv2dArgs&);
// That of what follows the convolution.
CONVBLOCKS_KERNEL const char* convblocks_dense_conv2d_backward(const convblocks::Context&,
                                                               const convblocks::ScaleShiftActBackwardArgs&);
