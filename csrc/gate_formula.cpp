#include "gate_formula.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardswish_backward.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/relu6.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/threshold_backward.h>

namespace convblocks {

using at::Tensor;

Tensor activate(const Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu: return at::relu(x);
    case Activation::relu6: return at::relu6(x);
    case Activation::silu: return at::silu(x);
    case Activation::gelu: return at::gelu(x);
    case Activation::gelu_tanh: return at::gelu(x, "tanh");
    case Activation::hardswish: return at::hardswish(x);
    case Activation::leaky_relu: return at::leaky_relu(x, kLeakySlope);
    case Activation::none: return x;
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor activate_backward(const Tensor& grad, const Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::relu: return at::threshold_backward(grad, x, 0);
    case Activation::relu6: return at::hardtanh_backward(grad, x, 0, 6);
    case Activation::silu: {  // not at::silu_backward: torch cannot differentiate it
      const Tensor s = at::sigmoid(x);
      return grad * s * (1 + x * (1 - s));
    }
    case Activation::gelu: return at::gelu_backward(grad, x);
    case Activation::gelu_tanh: return at::gelu_backward(grad, x, "tanh");
    case Activation::hardswish: return at::hardswish_backward(grad, x);
    case Activation::leaky_relu: return at::leaky_relu_backward(grad, x, kLeakySlope, false);
    case Activation::none: return grad;
  }
  TORCH_INTERNAL_ASSERT(false);
}

// Not at::hardsigmoid: torch cannot differentiate it twice.
Tensor apply_gate(const Tensor& x, Gate gate) { return gate == Gate::sigmoid ? at::sigmoid(x) : at::relu6(x + 3) / 6; }

Tensor apply_gate_backward(const Tensor& grad, const Tensor& x, const Tensor& gated, Gate gate) {
  return gate == Gate::sigmoid ? grad * gated * (1 - gated) : at::hardtanh_backward(grad, x + 3, 0, 6) / 6;
}

}  // namespace convblocks
