// What a norm at inference, and the bias of the convolution before it, do to each channel: a factor and an offset.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <optional>

#include "op.h"

namespace convblocks {

struct NormFactors {
  using MaybeTensor = std::optional<Tensor>;
  MaybeTensor scale, shift;

  // Of contiguous tensors of one dtype, float or double, on the CPU. Without statistics the bias is left.
  NormFactors(const MaybeTensor& bias, const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& gamma,
              const MaybeTensor& beta, double eps)
      : shift(bias) {
    if (!mean.has_value()) return;
    scale = at::empty_like(*mean), shift = at::empty_like(*mean);
    const auto compute = [&]<class A>(A) {
      const auto data = [](const MaybeTensor& t) { return static_cast<const A*>(data_of(t)); };
      const A *m = data(mean), *v = data(var), *g = data(gamma), *offset = data(beta), *before = data(bias);
      A *const to = static_cast<A*>(scale->data_ptr()), *const to_shift = static_cast<A*>(shift->data_ptr());
      for (int64_t i = 0; i < mean->numel(); i++) {
        to[i] = (g ? g[i] : A(1)) / std::sqrt(v[i] + static_cast<A>(eps));
        to_shift[i] = (offset ? offset[i] : A(0)) - (before ? m[i] - before[i] : m[i]) * to[i];
      }
    };
    mean->scalar_type() == at::kDouble ? compute(double{}) : compute(float{});
  }
};

}  // namespace convblocks
