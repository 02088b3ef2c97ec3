// The whole convolutional block attention module on the CPU: the kernels of its parts, one after the other for a few samples
// at a time, which stay in the cache of the thread that has them.
#include "../cbam.h"

#include <new>
#include <vector>

#include "../channel_attention.h"
#include "../channel_pool.h"
#include "channel_gate.h"
#include "dispatch.h"
#include "gate_map.h"

namespace convblocks::cpu {
namespace {

// What a kernel is lent that runs in one thread: memory that serves the next samples again.
class Alone : public Context {
 public:
  explicit Alone(const Context& all) : Context(all) {
    threads = 1;
    workspace = [](const Context& context, size_t bytes) { return static_cast<const Alone&>(context).take(bytes); };
  }
  void reuse() { taken_ = 0; }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  void* take(size_t bytes) const {
    const size_t lines = bytes / sizeof(Line) + 1;
    if (taken_ == kept_.size()) kept_.emplace_back();
    std::vector<Line>& memory = kept_[taken_++];
    if (memory.size() < lines) memory = std::vector<Line>(lines);
    return memory.data();
  }
  mutable size_t taken_ = 0;
  mutable std::vector<std::vector<Line>> kept_;
};

void expect(const char* error) {
  if (error) throw std::bad_alloc();
}

template <class T>
void run(const Context& context, const CbamArgs& a, int64_t first, int64_t n, bool far) {
  const int64_t c = a.c, hw = a.h * a.w;
  const auto numbers = [&](int64_t count) { return static_cast<T*>(context.workspace(context, count * sizeof(T))); };
  T *channel = numbers(n * c), *planes = numbers(n * 2 * hw), *pixels = numbers(n * hw);
  Map x = a.x, y = a.y;
  x.data = row<T>(a.x, first, 0);
  y.data = row<T>(a.y, first, 0);
  const Map pooled{planes, 2 * hw, hw, 1};
  expect(convblocks_channel_attention(context, {a.dtype, n, c, hw, a.weights, x, channel, nullptr}));
  expect(convblocks_channel_pool(context, {a.dtype, n, c, hw, a.dtype, channel, x, pooled, nullptr}));
  expect(convblocks_pixel_gates(context, {a.dtype, n, 2, a.h, a.w, a.kernel, pooled, pixels}));
  gate_map<T>(context, {a.dtype, n, c, hw, {a.dtype, channel, pixels, a.residual}, x, y}, far);
}

template <class T>
void forward(const Context& context, const CbamArgs& a) {
  const int64_t size = a.c * a.h * a.w;
  const bool far = exceeds_caches(a.n * size * sizeof(T));
  const int64_t group = group_size<T>(size, 2 * a.c * a.weights.reduced);
  const bool small = a.n * size < 16384;  // not worth waking a thread for
  const int64_t whole = small ? a.n : a.n - a.n % context.threads;
  parallel_for(context, whole, small ? a.n : 1, [&](int64_t begin, int64_t end) {
    Alone alone(context);
    for (int64_t i = begin; i < end; i += group, alone.reuse()) run<T>(alone, a, i, std::min(group, end - i), far);
  });
  for (int64_t i = whole; i < a.n; i++) run<T>(context, a, i, 1, far);
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_cbam(const convblocks::Context& context, const convblocks::CbamArgs& args) {
  using namespace convblocks;
  return cpu::dispatch(args.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<T, cpu::Acc<T>>) cpu::forward<T>(context, args);
  });
}
