// CUDA's vocabulary for g++: a .cu file that includes this header compiles as plain C++20, and its kernels run on the
// CPU. runtime.cpp runs every CUDA thread as a fiber and the blocks one after another; it reports divergent barriers and
// broken rules of warp operations instead of hanging. What is missing here (floating-point atomics, clusters) kernels
// are not meant to use. The limits are those of an H100.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local  // gathers the arrays in one segment, which the runtime poisons for each block

#define CUDA_CPU_VECTORS(T, name)                                                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_CPU_VECTORS(unsigned char, uchar)
CUDA_CPU_VECTORS(short, short)
CUDA_CPU_VECTORS(unsigned short, ushort)
CUDA_CPU_VECTORS(int, int)
CUDA_CPU_VECTORS(unsigned, uint)
CUDA_CPU_VECTORS(long long, longlong)
CUDA_CPU_VECTORS(unsigned long long, ulonglong)
CUDA_CPU_VECTORS(float, float)
CUDA_CPU_VECTORS(double, double)
#undef CUDA_CPU_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

// ---- What runtime.cpp provides ----
namespace cuda_cpu {

using Where = std::source_location;

struct Coordinates {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern Coordinates here;  // of the CUDA thread that runs now

struct Launch {
  dim3 grid, block;
  size_t dynamic_bytes;  // of shared memory
  const void* kernel;    // its address is its name
  void (*body)(const void* call);
  const void* call;
  size_t call_bytes;
};
void run(const Launch&);

enum class WarpOperation { sync, shuffle, ballot };
// Waits for the lanes of the mask. A shuffle returns the value of lane `source`, a ballot the lanes with a true value.
uint64_t warp_operation(WarpOperation, unsigned mask, uint64_t value, int source, const Where&);
void sync_block(const Where&);
int lane();
void* dynamic_shared();
cudaError_t set_dynamic_limit(const void* kernel, int bytes);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t, A... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  } const call{kernel, {static_cast<P>(arguments)...}};
  auto body = [](const void* p) {
    auto& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.arguments);
  };
  run({grid, block, dynamic_bytes, reinterpret_cast<const void*>(kernel), body, &call, sizeof call});
}

template <class T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(WarpOperation::shuffle, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_cpu

#define CB_LAUNCH(kernel, grid, block, dynamic_bytes, stream, ...) \
  cuda_cpu::launch(kernel, grid, block, dynamic_bytes, stream, __VA_ARGS__)
#define CB_DYN_SHARED(T, name) T* name = static_cast<T*>(cuda_cpu::dynamic_shared())

// ---- Inside kernels ----
#define threadIdx (cuda_cpu::here.thread)
#define blockIdx (cuda_cpu::here.block)
#define blockDim (cuda_cpu::here.block_dim)
#define gridDim (cuda_cpu::here.grid_dim)
constexpr int warpSize = 32;

inline void __syncthreads(const cuda_cpu::Where& where = cuda_cpu::Where::current()) { cuda_cpu::sync_block(where); }
inline void __syncwarp(unsigned mask = ~0u, const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  cuda_cpu::warp_operation(cuda_cpu::WarpOperation::sync, mask, 0, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  int first = cuda_cpu::lane() & -width;
  return cuda_cpu::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  int lane = cuda_cpu::lane(), source = lane - int(delta);
  return cuda_cpu::shuffle(mask, value, source >= (lane & -width) ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  int lane = cuda_cpu::lane(), source = lane + int(delta);
  return cuda_cpu::shuffle(mask, value, source < (lane & -width) + width ? source : lane, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  int lane = cuda_cpu::lane(), source = lane ^ bits;
  return cuda_cpu::shuffle(mask, value, source < (lane & -width) + width ? source : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  return unsigned(cuda_cpu::warp_operation(cuda_cpu::WarpOperation::ballot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const cuda_cpu::Where& where = cuda_cpu::Where::current()) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

// Integers only: sums of floating-point numbers in an order that the scheduler chooses are not reproducible.
template <class T>
__forceinline__ T atomicAdd(T* p, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <class T>
__forceinline__ T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
__forceinline__ void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
__forceinline__ void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- On the host ----
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t);  // with the details of the last one
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // the others are hints
  return cuda_cpu::set_dynamic_limit(reinterpret_cast<const void*>(kernel), value);
}
