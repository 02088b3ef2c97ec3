// Takes the place of torch's CPU allocator while kernels are watched: outputs and workspaces that an operator allocates
// are then known to memory.cpp with their exact sizes, and start as NaN.
#include <c10/core/Allocator.h>

#include <cstring>
#include <mutex>
#include <unordered_map>

#include "memory.h"

namespace cuda_cpu {
namespace {

constexpr uint8_t kPriority = 255;

class WatchedAllocator final : public c10::Allocator {
 public:
  c10::Allocator* inner = nullptr;

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr block = inner->allocate(bytes);
    void* data = block.get();
    const c10::Device device = block.device();
    if (data) {
      std::memset(data, 0xff, bytes);
      allow(data, bytes, nullptr, true);
      const std::lock_guard lock(mutex());
      blocks()[data] = std::move(block);
    }
    return {data, data, &release, device};  // torch's convolutions ask that the context be the memory
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  static void release(void* data) {
    if (!data) return;
    forget(data);
    const std::lock_guard lock(mutex());
    blocks().erase(data);
  }
  static std::unordered_map<void*, c10::DataPtr>& blocks() {
    static auto* all = new std::unordered_map<void*, c10::DataPtr>;  // tensors may outlive what is static
    return *all;
  }
  static std::mutex& mutex() {
    static auto* one = new std::mutex;
    return *one;
  }
};

}  // namespace

void watch_allocations(bool on) {
  static WatchedAllocator allocator;
  c10::Allocator* current = c10::GetAllocator(c10::kCPU);
  if (on == (current == &allocator)) return;
  if (on) allocator.inner = current;
  c10::SetAllocator(c10::kCPU, on ? &allocator : allocator.inner, kPriority);
}

}  // namespace cuda_cpu
