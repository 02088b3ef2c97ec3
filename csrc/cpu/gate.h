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

inline VecF absolute(VecF v) { return (VecF)((VecI)v & INT32_MAX); }

// exp(-v * v / 2), the density of the normal distribution but for its factor. In float it is 0 where it is below 2^-126.
inline VecD bell(VecD v) { return exp(v * v / -2); }
inline VecF bell(VecF v) {
  const VecF exponent = v * v * static_cast<float>(-M_LOG2E / 2);
  return exponent < -126 ? VecF{} : exp2_of_negative(exponent);
}
// The normal distribution function of v, whose bell(v) is `density`. In float: about 0 a polynomial, within 8e-8; else the
// tail on the side of v, within 4 ulp, as the bell times a polynomial of t = 1 / (1 + 0.4 |v|), both of least largest
// relative error. Its tanh approximation is sigmoid(tanh_argument(v)).
inline VecD normal_cdf(VecD v, VecD) {
  return each_lane(v * -M_SQRT1_2, [](double a) { return std::erfc(a); }) / 2;
}
inline VecF normal_cdf(VecF v, VecF density) {
  const VecF square = v * v;
  VecF small = splat<VecF>(9.423522883e-5f);
  small = small * square - 1.169353668e-3f;
  small = small * square + 9.967196844e-3f;
  small = small * square - 6.648958271e-2f;
  small = small * square + 3.989422642e-1f;
  const VecF t = 1 / (1 + 0.4f * absolute(v));
  VecF tail = splat<VecF>(6.812139777e-2f);
  tail = tail * t - 1.864280738e-1f;
  tail = tail * t + 1.053632435e-1f;
  tail = tail * t + 5.554051659e-2f;
  tail = tail * t + 1.390023191e-1f;
  tail = tail * t + 1.590999888e-1f;
  tail = tail * t + 1.595957831e-1f;
  tail = tail * t * density;
  return square < 1 ? v * small + 0.5f : v < 0 ? tail : 1 - tail;
}
template <class V>
inline V tanh_argument(V v) {
  using A = Lane<V>;
  return A(M_SQRT2 * M_2_SQRTPI) * (v + A(0.044715) * v * v * v);
}

template <class V>
inline V activate(V v, Activation activation) {
  using A = Lane<V>;
  switch (activation) {
    case Activation::relu: return v < 0 ? V{} : v;
    case Activation::relu6: return clamp(v, 0, 6);
    case Activation::silu: return v * sigmoid(v);
    case Activation::gelu: return v * normal_cdf(v, bell(v));
    case Activation::gelu_tanh: return v * sigmoid(tanh_argument(v));
    case Activation::hardswish: return v * clamp(v + 3, 0, 6) / 6;
    case Activation::leaky_relu: return v < 0 ? v * A(kLeakySlope) : v;
    case Activation::none: return v;
  }
  return v;
}

template <class V>
inline V activation_slope(V v, Activation activation) {
  using A = Lane<V>;
  const V zero{}, one = splat<V>(1);
  switch (activation) {
    case Activation::relu: return v <= 0 ? zero : one;
    case Activation::relu6: return (v <= 0) | (v >= 6) ? zero : one;
    case Activation::silu: {
      const V s = sigmoid(v);
      return s * (1 + v * (1 - s));
    }
    case Activation::gelu: {
      const V density = bell(v);
      return normal_cdf(v, density) + v * density * A(M_2_SQRTPI * M_SQRT1_2 / 2);
    }
    case Activation::gelu_tanh: {
      const V s = sigmoid(tanh_argument(v));
      return s + v * s * (1 - s) * A(M_SQRT2 * M_2_SQRTPI) * (1 + A(3 * 0.044715) * v * v);
    }
    case Activation::hardswish: return v <= -3 ? zero : v < 3 ? v / 3 + A(0.5) : one;
    case Activation::leaky_relu: return v > 0 ? one : splat<V>(kLeakySlope);
    case Activation::none: return one;
  }
  return one;
}

// Where a slope is 0 by definition and not by rounding, a gradient that is not finite ends, as in torch.
template <class V>
inline V select(V grad, V slope) {
  return slope == 0 ? V{} : grad * slope;
}

template <class V>
inline V activation_backward(V grad, V v, Activation activation) {
  const V slope = activation_slope(v, activation);
  const bool pieces =
      activation == Activation::relu || activation == Activation::relu6 || activation == Activation::hardswish;
  return pieces ? select(grad, slope) : grad * slope;
}

template <class V>
inline V apply_gate(V v, Gate gate) {
  return gate == Gate::sigmoid ? sigmoid(v) : clamp(v + 3, 0, 6) / 6;
}

// `gated` is apply_gate(v, gate).
template <class V>
inline V gate_backward(V grad, V v, V gated, Gate gate) {
  if (gate == Gate::sigmoid) return grad * (gated * (1 - gated));
  return select(grad, (v > -3) & (v < 3) ? splat<V>(Lane<V>(1) / 6) : V{});
}

}  // namespace convblocks::cpu
