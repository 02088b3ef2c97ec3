// torch's convolution as the operations use it.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace convblocks {

// Whether the kernels loaded for the device of x convolve maps of its dtype themselves: halves they would widen one by
// one.
bool kernels_convolve(const at::Tensor& x);

// The gradients of x and of the weight, of any dtype, from that of the output. On the CPU some are taken in float32 (torch
// 2.14): all of float16, as torch's own take a hundred times as long; those of the weight then depend in the last bits on
// the number of threads, as those of float32 do. Of bfloat16, those of maps that the stride exceeds, as torch's own read
// memory beyond the map (AVX-512), and where values are not finite, which are looked for with `real` tensors: torch's own
// take those that a tap never meets times zero.
// Of a single pixel torch's are not the same from run to run (float32, several threads, AVX-512): `real` ones are computed
// with a second sample, of zeros, and so without products of a matrix and a vector.
std::tuple<at::Tensor, at::Tensor> convolution_gradients(const at::Tensor& grad, const at::Tensor& x,
                                                         const at::Tensor& weight, c10::SymIntArrayRef stride,
                                                         c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                                                         const c10::SymInt& groups, bool real);

}  // namespace convblocks
