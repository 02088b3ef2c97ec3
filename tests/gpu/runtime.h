// What the parts of the runtime share; kernels see only cuda_cpu.h.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda_cpu.h"

namespace cuda_cpu {

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t address) const { return address >= begin && address < end; }
};

// The access that happens now, by the order that CUDA's rules give it.
struct Now {
  int thread = -1;                        // number in its block; -1: host code
  int64_t block = 0;                      // counted over all launches
  int64_t first_block = 0;                // of this launch
  uint32_t block_epoch = 0;               // barriers that the block has passed
  std::array<uint32_t, 32> warp_epoch{};  // warp operations that each warp has completed
  Range stack, static_shared, dynamic_shared, call;
};
extern Now now;

// Notes a fault for the tests; the first one also fails the launch.
void report(const std::string& fault);

// Ends the launch from inside a kernel, before it does what it is about to do.
void stop_launch();

}  // namespace cuda_cpu
