// Who works on a sample: one thread, so that the sample stays in its cache between the passes, or all of them.
#pragma once
#include <algorithm>
#include <memory>

#include "../kernel.h"

namespace convblocks::cpu {

// Calls f(begin, end) on disjoint ranges of [0, end).
template <class F>
void parallel_for(const Context& context, int64_t end, int64_t grain, F f) {
  if (context.threads == 1 || end <= grain) {
    if (end > 0) f(int64_t{0}, end);
    return;
  }
  context.parallel_for(
      end, grain, [](void* data, int64_t begin, int64_t stop) { (*static_cast<F*>(data))(begin, stop); }, &f);
}

// Uninitialised memory that begins where a line of the cache does: a vector that lies across two costs two reads.
template <class A>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : own_(std::make_unique_for_overwrite<A[]>(size + kLineBytes / sizeof(A))), size_(size) {
    const auto address = reinterpret_cast<uintptr_t>(own_.get());
    data_ = own_.get() + (kLineBytes - address % kLineBytes) / sizeof(A);
  }
  A* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  static constexpr size_t kLineBytes = 64;
  std::unique_ptr<A[]> own_;
  A* data_ = nullptr;
  int64_t size_ = 0;
};

// Uninitialised memory of the calling thread. A small one is kept for the thread's next call.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    constexpr int64_t kept = (2 << 20) / sizeof(A);
    static thread_local Buffer<A> lasting;
    if (size > kept)
      own_ = Buffer<A>(size);
    else if (!lasting.size())
      lasting = Buffer<A>(kept);
    data_ = size > kept ? own_.data() : lasting.data();
  }
  A* data() const { return data_; }

 private:
  Buffer<A> own_;
  A* data_;
};

class Team {
 public:
  explicit Team(const Context* all) : all_(all) {}  // null: the calling thread alone
  // Calls f(begin, end) on disjoint ranges of [0, end); an item is about `cost` elements of work.
  template <class F>
  void split(int64_t end, int64_t cost, F f) const {
    if (all_) {
      parallel_for(*all_, end, std::max<int64_t>(1, kWorth / std::max<int64_t>(cost, 1)), f);
    } else if (end > 0) {
      f(int64_t{0}, end);
    }
  }

 private:
  static constexpr int64_t kWorth = 8192;  // elements that are worth waking a thread for
  const Context* all_;
};

// Calls f(first, count, team) for groups of at most `group` samples: to threads while there are enough samples, the rest
// one by one to all threads together.
template <class F>
void for_each_group(const Context& context, int64_t n, int64_t group, int64_t elements, F f) {
  const Team alone(nullptr), all(&context);
  const bool small = n * elements < 16384;  // not worth waking a thread for
  const int64_t whole = small ? n : n - n % context.threads;
  parallel_for(context, whole, small ? n : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += group) f(i, std::min(group, end - i), alone);
  });
  for (int64_t i = whole; i < n; i++) f(i, int64_t{1}, all);
}

template <class F>
void for_each_sample(const Context& context, int64_t n, int64_t elements, F f) {
  for_each_group(context, n, 1, elements, [&](int64_t sample, int64_t, const Team& team) { f(sample, team); });
}

}  // namespace convblocks::cpu
