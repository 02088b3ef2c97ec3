// The activations and gates of gate.h and their derivatives on vectors.
#pragma once
#include "../gate.h"
#include "vec.h"

namespace convblocks::cpu {

template <class V>
inline V clamp(V v, Lane<V> low, Lane<V> high) {  // a NaN stays one
  v = v < low ? splat<V>(low) : v;
  return v > high ? splat<V>(high) : v;
}

template <class V>
inline V tanh(V v) {
  return 2 * sigmoid(2 * v) - 1;
}

template <class V>
inline V activate(V v, Activation activation) {
  using A = Lane<V>;
  switch (activation) {
    case Activation::relu: return v < 0 ? V{} : v;
    case Activation::relu6: return clamp(v, 0, 6);
    case Activation::silu: return v * sigmoid(v);
    case Activation::gelu: return v / 2 * (1 + each_lane(v * A(M_SQRT1_2), [](A a) { return std::erf(a); }));
    case Activation::gelu_tanh: return v / 2 * (1 + tanh(A(M_SQRT2 * M_2_SQRTPI / 2) * (v + A(0.044715) * v * v * v)));
    case Activation::hardswish: return v * clamp(v + 3, 0, 6) / 6;
    case Activation::leaky_relu: return v < 0 ? v * A(kLeakySlope) : v;
  }
  return v;
}

template <class V>
inline V activation_slope(V v, Activation activation) {
  using A = Lane<V>;
  const V zero{}, one = splat<V>(1);
  switch (activation) {
    case Activation::relu: return v <= 0 ? zero : one;
    case Activation::relu6: return (v > 0) & (v < 6) ? one : zero;
    case Activation::silu: {
      const V s = sigmoid(v);
      return s * (1 + v * (1 - s));
    }
    case Activation::gelu: {
      const V cdf = (1 + each_lane(v * A(M_SQRT1_2), [](A a) { return std::erf(a); })) / 2;
      return cdf + v * exp(v * v / -2) * A(M_2_SQRTPI * M_SQRT1_2 / 2);
    }
    case Activation::gelu_tanh: {
      constexpr A k = A(M_SQRT2 * M_2_SQRTPI / 2);
      const V t = tanh(k * (v + A(0.044715) * v * v * v));
      return (1 + t) / 2 + v / 2 * (1 - t * t) * k * (1 + A(3 * 0.044715) * v * v);
    }
    case Activation::hardswish: return v <= -3 ? zero : v < 3 ? v / 3 + A(0.5) : one;
    case Activation::leaky_relu: return v > 0 ? one : splat<V>(kLeakySlope);
  }
  return one;
}

template <class V>
inline V apply_gate(V v, Gate gate) {
  return gate == Gate::sigmoid ? sigmoid(v) : clamp(v + 3, 0, 6) / 6;
}

template <class V>
inline V gate_slope(V v, V gated, Gate gate) {
  if (gate == Gate::sigmoid) return gated * (1 - gated);
  return (v > -3) & (v < 3) ? splat<V>(Lane<V>(1) / 6) : V{};
}

}  // namespace convblocks::cpu
