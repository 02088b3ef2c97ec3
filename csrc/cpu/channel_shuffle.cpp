// Channel shuffle on the CPU: planes are copied as they are (NCHW), the channels of a pixel are woven (channels_last).
#include "../channel_shuffle.h"

#include <cstring>

#include "dispatch.h"
#include "reduce.h"

namespace convblocks::cpu {
namespace {

// A run of pixels by their strides.
template <class T>
struct Pixels {
  const T* from;
  T* to;
  int64_t from_stride, to_stride, count;
};

// In each pixel `few` streams of `length` elements, lying one after the other, woven into one; or, unwoven, the other way.
// A constant number of streams makes vector code.
template <class T, bool kWeave, int kFew>
void shuffle_pixels(const Pixels<T>& pixels, int64_t few, int64_t length) {
  if constexpr (kFew != 0) few = kFew;
  for (int64_t p = 0; p < pixels.count; p++) {
    const T* __restrict from = pixels.from + p * pixels.from_stride;
    T* __restrict to = pixels.to + p * pixels.to_stride;
    for (int64_t j = 0; j < length; j++) {
      for (int64_t i = 0; i < few; i++) {
        if constexpr (kWeave)
          to[j * few + i] = from[i * length + j];
        else
          to[i * length + j] = from[j * few + i];
      }
    }
  }
}

template <class T, bool kWeave>
auto shuffle_of(int64_t few) {
  switch (few) {
    case 1: return shuffle_pixels<T, kWeave, 1>;  // a copy
    case 2: return shuffle_pixels<T, kWeave, 2>;
    case 3: return shuffle_pixels<T, kWeave, 3>;
    case 4: return shuffle_pixels<T, kWeave, 4>;
    case 8: return shuffle_pixels<T, kWeave, 8>;
  }
  return shuffle_pixels<T, kWeave, 0>;
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
  const int64_t few = std::min(a.groups, width), length = std::max(a.groups, width);
  const auto run = a.groups <= width ? shuffle_of<T, true>(few) : shuffle_of<T, false>(few);
  parallel_for(context, a.n * a.hw, std::max<int64_t>(1, 16384 / a.c), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / a.hw, pixel = begin % a.hw, count = std::min(end - begin, a.hw - pixel);
      run({of(a.x, sample) + pixel * a.x.pixel, of(a.y, sample) + pixel * a.y.pixel, a.x.pixel, a.y.pixel, count}, few,
          length);
      begin += count;
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
