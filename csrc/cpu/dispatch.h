// From a dtype at run time to a type; exceptions become the kernel's answer.
#pragma once
#include <exception>

#include "../kernel.h"
#include "vec.h"

namespace convblocks::cpu {

template <class F>
const char* dispatch(Dtype dtype, F f) {
  try {
    switch (dtype) {
      case Dtype::f32: f(float{}); break;
      case Dtype::f64: f(double{}); break;
      case Dtype::f16: f(f16{}); break;
      case Dtype::bf16: f(bf16{}); break;
    }
    return nullptr;
  } catch (const std::exception& e) {
    return "out of memory";
  }
}

}  // namespace convblocks::cpu
