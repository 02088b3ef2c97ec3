// Reductions in an order that depends on the sizes only, so that results are the same each time.
#pragma once
#include "cuda.h"

namespace convblocks::cuda {

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {  // of which a NaN on either side is the result, as in torch.amax
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a > b || a != a ? a : b;
  }
};

// Over the lanes of a warp, or of each `span` of them (both powers of two), that are a multiple of `apart` from each
// other: all get the result.
template <class A, class F = Sum>
__device__ A warp_reduce(A value, int apart = 1, F f = {}, int span = 32) {
  for (int lane = span / 2; lane >= apart; lane /= 2) value = f(value, __shfl_xor_sync(0xffffffffu, value, lane));
  return value;
}

// Over the threads of a team (threadIdx.x: whole warps, or a power of two below one) that have the same
// threadIdx.x % width, K numbers each: all get the results. `shared` holds width * K numbers for each warp of the team; it is free again on return.
template <int K, class A, class F = Sum>
__device__ void team_reduce(A (&values)[K], int width, A* shared, F f = {}) {
#pragma unroll
  for (int k = 0; k < K; k++) values[k] = warp_reduce(values[k], width, f, min(blockDim.x, 32u));
  if (blockDim.x <= 32) return;
  const int lane = threadIdx.x % 32, size = width * K;
  A* const row = shared + threadIdx.x / 32 * size;
#pragma unroll
  for (int k = 0; k < K; k++) {
    if (lane < width) row[k * width + lane] = values[k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    A total = shared[i];
    for (int other = size + i; other < static_cast<int>(blockDim.x) / 32 * size; other += size) {
      total = f(total, shared[other]);
    }
    shared[i] = total;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; k++) values[k] = shared[k * width + lane % width];
  __syncthreads();
}

}  // namespace convblocks::cuda
