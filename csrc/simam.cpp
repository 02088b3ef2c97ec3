#include "simam.h"

#include <ATen/ops/mean.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sum.h>

#include <cstdio>

#include "op.h"

namespace convblocks {

struct Simam {
  static constexpr const char* name = "simam";
  static constexpr const char* schema = "(Tensor x, float e_lambda) -> Tensor";
  static constexpr const char* backward_schema = "(Tensor grad, Tensor x, float e_lambda) -> Tensor";

  static void check(const Tensor& x, double e_lambda) {
    check_feature_map(name, x);
    char text[32];
    std::snprintf(text, sizeof(text), "%g", e_lambda);
    TORCH_CHECK_VALUE(e_lambda > 0, name, ": expected e_lambda > 0, got ", text);
  }

  struct Terms {
    Tensor d, q, gate;  // x - mean; 4 (v + lambda); sigmoid(d^2 / q + 1/2)
    c10::SymInt n;
  };
  static Terms terms(const Tensor& x, double e_lambda) {
    const c10::SymInt n = x.sym_size(2) * x.sym_size(3) - 1;
    Tensor d = x - x.mean({2, 3}, true);
    Tensor square = d * d;
    Tensor q = 4 * (square.sum({2, 3}, true) / at::Scalar(n) + e_lambda);
    return {d, q, at::sigmoid(square / q + 0.5), n};
  }

  static Tensor formula(const Tensor& x, double e_lambda) { return x * terms(x, e_lambda).gate; }

  static Tensor backward_formula(const Tensor& grad, const Tensor& x, double e_lambda) {
    const Terms s = terms(x, e_lambda);
    const Tensor t = grad * x * s.gate * (1 - s.gate);  // the gradient of the energy d^2 / q
    const Tensor spread = (t * s.d * s.d).sum({2, 3}, true) * 8 / (at::Scalar(s.n) * s.q * s.q);
    const Tensor h = 2 * t * s.d / s.q - s.d * spread;
    return grad * s.gate + h - h.mean({2, 3}, true);
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, double e_lambda) {
    const auto format = walk_format(x);
    kernel(SimamArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), e_lambda, Walk(x, format).map,
                     Walk(y, format).map});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, double e_lambda) {
    const auto format = walk_format(x);
    kernel(SimamBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), e_lambda, Walk(grad, format).map,
                             Walk(x, format).map, Walk(grads[0], format).map});
  }
};

CONVBLOCKS_REGISTER(Simam)

}  // namespace convblocks
