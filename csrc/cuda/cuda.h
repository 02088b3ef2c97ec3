// CUDA; or for g++, which compiles the same files for machines without a GPU, CUDA's vocabulary on the CPU.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define CB_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(__VA_ARGS__)
#define CB_DYN_SHARED(T, name)                                       \
  extern __shared__ __align__(16) unsigned char cb_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(cb_dynamic_shared)
#else
#include "cuda_cpu.h"
#endif
