// What memory.cpp and allocator.cpp share.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_cpu {

// Kernels may touch these bytes; with a mask, only those where it is not zero.
void allow(const void* begin, size_t bytes, const uint8_t* mask, bool writable);
void forget(const void* begin);

void watch_allocations(bool on);  // allow what torch allocates meanwhile

}  // namespace cuda_cpu
