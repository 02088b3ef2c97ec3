// What a kernel is given and what it is lent: plain C++, shared by the CPU and the CUDA kernels.
//
// A kernel is a function `extern "C" const char* convblocks_<op>(const Context&, const <Op>Args&)` in a shared object of
// its own (_cpu_<isa>, _cuda). It returns null, or a sentence that says why it could not run. Whoever calls it (_C) has
// checked every argument, allocated every output and found it by its name.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define CONVBLOCKS_KERNEL extern "C" __declspec(dllexport)
#else
#define CONVBLOCKS_KERNEL extern "C" __attribute__((visibility("default")))
#endif

namespace convblocks {

enum class Dtype : int32_t { f32, f64, f16, bf16 };

// A feature map (N, C, H*W) by its strides in elements. Pixels are evenly spaced, and either the pixels of a plane are
// neighbours (pixel == 1: NCHW) or the channels of a pixel are (channel == 1: channels_last). The batch stride, and the
// stride of the third direction, are free: a slice of channels needs no copy.
struct Map {
  void* data;
  int64_t batch, channel, pixel;
};

// What the caller lends for the length of one call.
struct Context {
  void* stream;  // cudaStream_t on CUDA, null on the CPU
  int threads;   // CPU threads that parallel_for uses
  // Uninitialised memory on the map's device, at least 64-byte aligned, the caller's again when the call returns.
  void* (*workspace)(const Context&, size_t bytes);
  // Calls body(data, begin, end) on disjoint ranges of [0, end), each of at least `grain`, and waits for all.
  void (*parallel_for)(int64_t end, int64_t grain, void (*body)(void* data, int64_t begin, int64_t end), void* data);
};

}  // namespace convblocks
