// Channel shuffle on the CPU: planes are copied as they are (NCHW), the channels of a pixel are woven (channels_last).
#include "../channel_shuffle.h"

#include <cstring>

#include "dispatch.h"
#include "reduce.h"

namespace convblocks::cpu {
namespace {

// `few` streams of `length` elements each, lying one after the other, woven into one; or `unweave`, the other way. A
// constant number of streams makes vector code.
template <class T, int kFew>
void weave(const T* __restrict from, T* __restrict to, int64_t few, int64_t length) {
  if constexpr (kFew != 0) few = kFew;
  for (int64_t j = 0; j < length; j++) {
    for (int64_t i = 0; i < few; i++) to[j * few + i] = from[i * length + j];
  }
}
template <class T, int kFew>
void unweave(const T* __restrict from, T* __restrict to, int64_t few, int64_t length) {
  if constexpr (kFew != 0) few = kFew;
  for (int64_t j = 0; j < length; j++) {
    for (int64_t i = 0; i < few; i++) to[i * length + j] = from[j * few + i];
  }
}

template <class T>
using Shuffle = void (*)(const T* __restrict from, T* __restrict to, int64_t few, int64_t length);

// The function for a pixel, and the streams it is called with.
template <class T>
Shuffle<T> shuffle_of(int64_t groups, int64_t width, int64_t& few, int64_t& length) {
  few = std::min(groups, width), length = std::max(groups, width);
  const bool in = groups <= width;  // groups are the streams that come in, or the elements of those that go out
  switch (few) {
    case 1: return weave<T, 1>;  // a copy
    case 2: return in ? weave<T, 2> : unweave<T, 2>;
    case 3: return in ? weave<T, 3> : unweave<T, 3>;
    case 4: return in ? weave<T, 4> : unweave<T, 4>;
    case 8: return in ? weave<T, 8> : unweave<T, 8>;
  }
  return in ? weave<T, 0> : unweave<T, 0>;
}

template <class T>
void shuffle(const Context& context, const ChannelShuffleArgs& a) {
  const int64_t width = a.c / a.groups;
  const auto of = [](const Map& map, int64_t sample) { return static_cast<T*>(map.data) + sample * map.batch; };
  if (a.x.pixel == 1) {
    parallel_for(context, a.n * a.c, std::max<int64_t>(1, 16384 / a.hw), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; plane++) {
        const int64_t sample = plane / a.c, c = plane % a.c, source = c % a.groups * width + c / a.groups;
        std::memcpy(of(a.y, sample) + c * a.y.channel, of(a.x, sample) + source * a.x.channel, a.hw * sizeof(T));
      }
    });
    return;
  }
  int64_t few, length;
  const Shuffle<T> weave_pixel = shuffle_of<T>(a.groups, width, few, length);
  parallel_for(context, a.n * a.hw, std::max<int64_t>(1, 16384 / a.c), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t sample = i / a.hw, pixel = i % a.hw;
      weave_pixel(of(a.x, sample) + pixel * a.x.pixel, of(a.y, sample) + pixel * a.y.pixel, few, length);
    }
  });
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_channel_shuffle(const convblocks::Context& context, const convblocks::ChannelShuffleArgs& args) {
  using namespace convblocks;
  switch (args.dtype) {  // values are moved, not computed with
    case Dtype::f64: cpu::shuffle<uint64_t>(context, args); break;
    case Dtype::f32: cpu::shuffle<uint32_t>(context, args); break;
    case Dtype::f16:
    case Dtype::bf16: cpu::shuffle<uint16_t>(context, args); break;
  }
  return nullptr;
}
