// What the operations with a number for each pixel share.
#pragma once
#include "reduce.h"
#include "tile.h"

namespace convblocks::cuda {

constexpr int kPixelThreads = 256;

// Gates of one kind as a kernel reads them; ones where there are none.
template <class T>
struct GateValues {
  Parameter<T> values;
  __device__ Acc<T> operator[](int64_t i) const { return values ? values[i] : Acc<T>(1); }
};

// out[sample][i] = the sum over the sample's parts of parts[sample][part][i].
template <class T>
__global__ void __launch_bounds__(kPixelThreads)
    add_parts_kernel(const Acc<T>* parts, int64_t samples, int64_t count, int64_t size, Parameter<T> out) {
  const int64_t i = int64_t{blockIdx.x} * kPixelThreads + threadIdx.x;
  if (i >= samples * size) return;
  const int64_t sample = i / size;
  const Acc<T>* part = parts + sample * count * size + i % size;
  Acc<T> total = 0;
#pragma unroll 4
  for (int64_t k = 0; k < count; k++) total += part[k * size];
  out.set(i, total);
}

template <class T>
void add_parts(const Context& context, const Acc<T>* parts, int64_t samples, int64_t count, int64_t size, void* out,
               Dtype dtype) {
  if (!out) return;
  CB_LAUNCH(add_parts_kernel<T>, ceil_div(samples * size, kPixelThreads), kPixelThreads, 0, stream_of(context), parts,
            samples, count, size, Parameter<T>(out, dtype));
}

}  // namespace convblocks::cuda
