// Whether the kernels loaded for the device of x convolve maps of its dtype themselves: halves they would widen one by
// one.
#pragma once
#include <ATen/core/Tensor.h>

namespace convblocks {

bool kernels_convolve(const at::Tensor& x);

}  // namespace convblocks
