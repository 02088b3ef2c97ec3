// The activations and gates that the attention blocks share, by the number the kernels know them by.
#pragma once
#include <cstdint>

namespace convblocks {

enum class Activation : int32_t { relu, relu6, silu, gelu, gelu_tanh, hardswish, leaky_relu, none };
enum class Gate : int32_t { sigmoid, hardsigmoid };

constexpr double kLeakySlope = 0.01;

}  // namespace convblocks
