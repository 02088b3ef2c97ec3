// Element types: what they are computed in, and vectors of them that move in one load or store.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "../kernel.h"
#include "cuda.h"

namespace convblocks::cuda {

using f16 = c10::Half;
using bf16 = c10::BFloat16;

// What an element type is computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, int V>
struct alignas(sizeof(T) * V) Vec {
  T data[V];
};

// Elements in a 16-byte vector; doubles go one by one, which keeps the number of kernels down.
template <class T>
inline constexpr int kVector = sizeof(T) == 8 ? 1 : 16 / sizeof(T);

template <int V, class T>
__device__ Vec<std::remove_const_t<T>, V> load(T* p) {
  return *reinterpret_cast<const Vec<std::remove_const_t<T>, V>*>(p);
}
template <class T, int V>
__device__ void store(T* p, const Vec<T, V>& v) {
  *reinterpret_cast<Vec<T, V>*>(p) = v;
}

// A weight or bias of an operation on maps of T: of T, or of float with a map of half precision.
template <class T>
class Parameter {
 public:
  Parameter() = default;
  Parameter(const void* data, Dtype dtype) : data_(const_cast<void*>(data)), wide_(dtype == Dtype::f32) {}
  __host__ __device__ explicit operator bool() const { return data_ != nullptr; }
  __device__ Acc<T> operator[](int64_t i) const {
    if (sizeof(T) == 2 && wide_) return static_cast<const float*>(data_)[i];
    return static_cast<Acc<T>>(static_cast<const T*>(data_)[i]);
  }
  __device__ void set(int64_t i, Acc<T> value) const {
    if (sizeof(T) == 2 && wide_) {
      static_cast<float*>(data_)[i] = value;
    } else {
      static_cast<T*>(data_)[i] = static_cast<T>(value);
    }
  }

 private:
  void* data_ = nullptr;
  bool wide_ = false;
};

// Calls f with a value of the element type.
template <class F>
const char* dispatch(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
    case Dtype::f16: return f(f16{});
    case Dtype::bf16: return f(bf16{});
  }
  return "unknown dtype";
}

// The memory that a kernel is lent for one call, in arrays of A. Asked for at once: every request costs a microsecond.
template <class A>
class Workspace {
 public:
  Workspace(const Context& context, int64_t size)
      : next_(static_cast<A*>(context.workspace(context, size * sizeof(A)))) {}
  A* take(int64_t size) {
    A* const array = next_;
    next_ += size;
    return array;
  }

 private:
  A* next_;
};

// What a kernel returns after its launches.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline cudaStream_t stream_of(const Context& context) { return static_cast<cudaStream_t>(context.stream); }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace convblocks::cuda
