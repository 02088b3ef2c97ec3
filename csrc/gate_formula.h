// The activations and gates as ATen formulas, for the composite forms; the order of the names is that of gate.h.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>

#include "gate.h"

namespace convblocks {

inline constexpr std::array<std::string_view, 8> kActivationNames{"relu",      "relu6",     "silu",       "gelu",
                                                                  "gelu_tanh", "hardswish", "leaky_relu", "none"};
inline constexpr std::array<std::string_view, 2> kGateNames{"sigmoid", "hardsigmoid"};

at::Tensor activate(const at::Tensor& x, Activation activation);
at::Tensor activate_backward(const at::Tensor& grad, const at::Tensor& x, Activation activation);
at::Tensor apply_gate(const at::Tensor& x, Gate gate);
// `gated` is apply_gate(x, gate).
at::Tensor apply_gate_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& gated, Gate gate);

}  // namespace convblocks
