// The activations and gates of gate.h and their derivatives, NaN and infinities as in torch.
#pragma once
#include <cmath>

#include "../gate.h"
#include "cuda.h"

namespace convblocks::cuda {

template <class A>
__device__ A clamp(A x, A low, A high) {  // a NaN stays one
  return x < low ? low : x > high ? high : x;
}

template <class A>
__device__ A sigmoid(A x) {
  return 1 / (1 + std::exp(-x));
}

template <class A>
__device__ A normal_cdf(A x) {
  return (1 + std::erf(x * A(0.70710678118654752))) / 2;
}

template <class A>
__device__ A gelu_tanh_term(A x) {
  return std::tanh(A(0.79788456080286536) * (x + A(0.044715) * x * x * x));
}

template <class A>
__device__ A activate(A x, Activation activation) {
  switch (activation) {
    case Activation::relu: return x < 0 ? A(0) : x;
    case Activation::relu6: return clamp(x, A(0), A(6));
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return x * normal_cdf(x);
    case Activation::gelu_tanh: return x / 2 * (1 + gelu_tanh_term(x));
    case Activation::hardswish: return x * clamp(x + 3, A(0), A(6)) / 6;
    case Activation::leaky_relu: return x < 0 ? x * A(kLeakySlope) : x;
    case Activation::none: return x;
  }
  return x;
}

// The gradient by x of what has the gradient `grad`. Where torch selects zero, zero, even if `grad` is NaN or infinite.
template <class A>
__device__ A activation_grad(A grad, A x, Activation activation) {
  switch (activation) {
    case Activation::relu: return x <= 0 ? A(0) : grad;
    case Activation::relu6: return x <= 0 || x >= 6 ? A(0) : grad;
    case Activation::silu: {
      const A s = sigmoid(x);
      return grad * s * (1 + x * (1 - s));
    }
    case Activation::gelu: return grad * (normal_cdf(x) + x * std::exp(x * x / -2) * A(0.39894228040143268));
    case Activation::gelu_tanh: {
      const A t = gelu_tanh_term(x);
      return grad * ((1 + t) / 2 + x / 2 * (1 - t * t) * A(0.79788456080286536) * (1 + A(3 * 0.044715) * x * x));
    }
    case Activation::hardswish: return x <= -3 ? A(0) : x < 3 ? grad * (x / 3 + A(0.5)) : grad;
    case Activation::leaky_relu: return x > 0 ? grad : grad * A(kLeakySlope);
    case Activation::none: return grad;
  }
  return grad;
}

template <class A>
__device__ A apply_gate(A x, Gate gate) {
  return gate == Gate::sigmoid ? sigmoid(x) : clamp(x + 3, A(0), A(6)) / 6;
}

template <class A>
__device__ A gate_grad(A grad, A x, A gated, Gate gate) {
  if (gate == Gate::sigmoid) return grad * (1 - gated) * gated;
  return x > -3 && x < 3 ? grad / 6 : A(0);
}

}  // namespace convblocks::cuda
