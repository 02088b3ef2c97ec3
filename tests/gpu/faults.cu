// Tiny kernels, each with one fault that the checkers must find, and clean ones in which they must find none.
// All are called as f(x, y, n): x has n floats, y has n floats.
#include "cuda_cpu.h"

namespace {

constexpr int kThreads = 128;

// ---- clean ----
__global__ void scale(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}

__global__ void scale_vectors(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n / 4) return;
  float4 v = reinterpret_cast<const float4*>(x)[i];
  reinterpret_cast<float4*>(y)[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

// y = the sum of the block's part of x, by shuffles, then static and dynamic shared memory.
template <int kBarriers>
__global__ void sum(const float* x, float* y, int n) {
  __shared__ float warp_sums[kThreads / 32];
  CB_DYN_SHARED(float, total);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float s = i < n ? x[i] : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) s += __shfl_xor_sync(~0u, s, lanes);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = s;
  if (kBarriers > 0) __syncthreads();
  if (threadIdx.x == 0) total[0] = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];
  if (kBarriers > 1) __syncthreads();
  if (i < n) y[i] = total[0];
}

// Lanes hand values to each other through shared memory; a warp operation orders them.
template <bool kOrdered>
__global__ void reverse_in_warp(const float* x, float* y, int n) {
  __shared__ float values[kThreads];
  const int i = threadIdx.x;
  values[i] = i < n ? x[i] : 0;
  if (kOrdered) __syncwarp();
  if (i < n) y[i] = values[i ^ 31];
}

// The exclusive prefix sum of the warp's votes, with a subset of the lanes in a shuffle.
__global__ void votes(const float* x, float* y, int n) {
  const int i = threadIdx.x, lane = i % 32;
  const unsigned positive = __ballot_sync(~0u, i < n && x[i] > 0);
  float first = float(__popc(positive & ((1u << lane) - 1)));
  if (lane < 16) first += __shfl_sync(0xffff, first, 0, 16) + 0 * __shfl_down_sync(0xffff, first, 1, 16);
  if (i < n) y[i] = first + (__any_sync(~0u, i >= n) && __all_sync(~0u, i < n));
}

__global__ void count(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n && x[i] == x[i]) atomicAdd(reinterpret_cast<int*>(y), 1);
}

// ---- faulty ----
__global__ void one_past_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i + 1];
}

__global__ void store_past_the_end(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[0];
}

__global__ void store_to_input(const float* x, float*, int) { const_cast<float*>(x)[0] = 1; }

__global__ void divergent_barrier(const float* x, float* y, int n) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
  if (int(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(const float* x, float* y, int n) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (int(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void divergent_shuffle(const float* x, float* y, int) {
  if (threadIdx.x % 32 != 5) y[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  __syncwarp();
}

__global__ void shuffle_outside_mask(const float* x, float* y, int) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(0xffffu, x[threadIdx.x], 16);
}

__global__ void not_in_own_mask(const float* x, float* y, int) {
  y[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, x[threadIdx.x], 1);
}

__global__ void misaligned(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i >= (n - 1) / 4) return;
  float4 v = reinterpret_cast<const float4*>(x + 1)[i];
  y[i] = v.x + v.y + v.z + v.w;
}

__global__ void two_blocks_one_address(const float* x, float* y, int) {
  if (threadIdx.x == 0) y[0] = x[blockIdx.x];
}

__global__ void block_reads_another(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + y[(i + kThreads) % n];
}

__global__ void atomic_and_store(const float*, float* y, int) {
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) y[0] = 0;
    atomicAdd(reinterpret_cast<int*>(y), 1);
  }
}

__global__ void static_overrun(const float* x, float* y, int n) {
  __shared__ float part[kThreads];
  const int i = threadIdx.x;
  part[i + (n > 0)] = x[i];
  __syncthreads();
  y[i] = part[i];
}

__global__ void dynamic_overrun(const float* x, float* y, int) {
  CB_DYN_SHARED(float, part);
  const int i = threadIdx.x;
  part[i + 1] = x[i];
  __syncthreads();
  y[i] = part[i + 1];
}

__global__ void uninitialised_shared(const float*, float* y, int n) {
  __shared__ float part[kThreads];
  CB_DYN_SHARED(float, whole);
  if (n < 0) part[threadIdx.x] = 0;
  y[blockIdx.x * kThreads + threadIdx.x] = blockIdx.x ? part[threadIdx.x] : whole[threadIdx.x];
}

__global__ void integer_overflow(const float* x, float* y, int n) {
  int big = 0x7fffffff - n;
  y[threadIdx.x] = float(big + 2 * n) + x[threadIdx.x];
}

}  // namespace

#define CALL(name, kernel, dynamic_bytes)                                                                    \
  extern "C" __attribute__((visibility("default"))) const char* name(const float* x, float* y, int n) {      \
    CB_LAUNCH(kernel, dim3((n + kThreads - 1) / kThreads), dim3(kThreads), dynamic_bytes, nullptr, x, y, n); \
    const cudaError_t error = cudaGetLastError();                                                            \
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);                                       \
  }

CALL(clean_scale, scale, 0)
CALL(clean_scale_vectors, scale_vectors, 0)
CALL(clean_sum, sum<2>, sizeof(float))
CALL(clean_reverse, reverse_in_warp<true>, 0)
CALL(clean_votes, votes, 0)
CALL(clean_count, count, 0)
CALL(one_past_the_end, one_past_the_end, 0)
CALL(store_past_the_end, store_past_the_end, 0)
CALL(store_to_input, store_to_input, 0)
CALL(missing_barrier, sum<0>, sizeof(float))
CALL(missing_second_barrier, sum<1>, sizeof(float))
CALL(missing_syncwarp, reverse_in_warp<false>, 0)
CALL(divergent_barrier, divergent_barrier, 0)
CALL(two_barriers, two_barriers, 0)
CALL(divergent_shuffle, divergent_shuffle, 0)
CALL(shuffle_outside_mask, shuffle_outside_mask, 0)
CALL(not_in_own_mask, not_in_own_mask, 0)
CALL(misaligned, misaligned, 0)
CALL(two_blocks_one_address, two_blocks_one_address, 0)
CALL(block_reads_another, block_reads_another, 0)
CALL(atomic_and_store, atomic_and_store, 0)
CALL(static_overrun, static_overrun, 0)
CALL(dynamic_overrun, dynamic_overrun, kThreads * sizeof(float))
CALL(uninitialised_shared, uninitialised_shared, kThreads * sizeof(float))
CALL(integer_overflow, integer_overflow, 0)
CALL(too_much_shared_memory, scale, (48 << 10) + 1)

extern "C" __attribute__((visibility("default"))) const char* opted_in(const float* x, float* y, int bytes) {
  cudaError_t error = cudaFuncSetAttribute(scale_vectors, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    CB_LAUNCH(scale_vectors, dim3(1), dim3(kThreads), size_t(bytes), nullptr, x, y, kThreads);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
