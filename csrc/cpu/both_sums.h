// Sums over the pixels of each channel and over the channels of each pixel, in one read of a sample, for the two
// layouts. The order of the additions depends on the sizes only.
#pragma once
#include "weights.h"

namespace convblocks::cpu {

// A sample, or a stretch of its pixels. kPlanes: lanes run over pixels; else over channels.
template <class T, bool kPlanes>
struct Part {
  T* data;
  int64_t stride;  // between channels, or between pixels
  T* at(int64_t channel, int64_t pixel) const {
    return kPlanes ? data + channel * stride + pixel : data + pixel * stride + channel;
  }
  // The same for both_sums, whose four rows at a time are more than the processor foresees: the next four are fetched.
  T* with_next(int64_t channel, int64_t pixel) const {
    T* const own = at(channel, pixel);
    __builtin_prefetch(own + 4 * stride, 0, 2);
    return own;
  }
};

// Numbers of the channels, or of the pixels, in the lanes of a vector that begins at one.
template <bool kPlanes, class A, class L>
CONVBLOCKS_LOOP inline Vec<A> of_channel(const A* numbers, int64_t channel, L lanes) {
  if constexpr (kPlanes)
    return splat<Vec<A>>(numbers[channel]);
  else
    return load(numbers + channel, lanes);
}
template <bool kPlanes, class A, class L>
CONVBLOCKS_LOOP inline Vec<A> of_pixel(const A* numbers, int64_t pixel, L lanes) {
  if constexpr (kPlanes)
    return load(numbers + pixel, lanes);
  else
    return splat<Vec<A>>(numbers[pixel]);
}

template <class A, int KC, int KP>
struct Terms {
  Vecs<A, KC> channel;
  Vecs<A, KP> pixel;
};

// What is summed on its own: few enough terms for the sums to be exact, and work for several threads.
template <class T, bool kPlanes>
struct Blocks {
  static constexpr int64_t kPixels = kPlanes ? 64 * kLanes<T> : kPixelChunk, kChannels = 128,
                           kChannelsInRow = 128 * kLanes<T>;  // the pixel's sums in channels_last
  int64_t pixels, channels;                                   // how many blocks of them
  Blocks(int64_t c, int64_t hw)
      : pixels((hw + kPixels - 1) / kPixels), channels(kPlanes ? (c + kChannels - 1) / kChannels : 1) {}
};

template <class T, bool kPlanes>
int64_t both_sums_size(int64_t c, int64_t hw, int kc, int kp) {
  const Blocks<T, kPlanes> blocks(c, hw);
  return blocks.pixels * kc * c + blocks.channels * kp * hw;
}

// out[i] = the sum of the `count` rows of n numbers in partial.
template <class A>
void add_rows(const A* partial, int64_t count, int64_t n, A* out) {
  for_lanes<A>(n, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    Vec<A> total = load(partial + i, lanes);
    for (int64_t row = 1; row < count; row++) total += load(partial + row * n + i, lanes);
    store(out + i, total, lanes);
  });
}

// The KC sums of each of c channels into channels[k * c + channel], the KP sums of each pixel into pixels[k * hw +
// pixel], of f(channel, pixel, lanes) -> Terms<A, KC, KP>. `partial` is workspace of both_sums_size elements.
template <class T, bool kPlanes, int KC, int KP, class F>
CONVBLOCKS_LOOP inline void both_sums(const Team& team, int64_t c, int64_t hw, Acc<T>* partial, Acc<T>* channels,
                                      Acc<T>* pixels, F f) {
  using A = Acc<T>;
  const Blocks<T, kPlanes> blocks(c, hw);
  A* const by_channel = blocks.pixels == 1 ? channels : partial;
  A* const by_pixel = blocks.channels == 1 ? pixels : partial + blocks.pixels * KC * c;
  const auto block = [=](int64_t pixel_block, int64_t channel_block) CONVBLOCKS_LOOP {
    const int64_t first = pixel_block * blocks.kPixels, end = std::min(hw, first + blocks.kPixels);
    A* const channel_sums = by_channel + pixel_block * KC * c;
    if constexpr (kPlanes) {
      const int64_t first_channel = channel_block * blocks.kChannels;
      A* const pixel_sums = by_pixel + channel_block * KP * hw;
      by_four(std::min(c - first_channel, blocks.kChannels),
              [=]<int G>(int64_t offset, std::integral_constant<int, G>) {
                const int64_t i = first_channel + offset;
                std::array<Vecs<A, KC>, G> acc{};
                const auto run = [&](auto is_first) CONVBLOCKS_LOOP {
                  for_lanes<T>(end - first, [&](int64_t at, auto lanes) CONVBLOCKS_LOOP {
                    const int64_t p = first + at;
                    Vecs<A, KP> sums{};
                    if constexpr (!is_first) {
                      for (int k = 0; k < KP; k++) sums[k] = load(pixel_sums + k * hw + p, lanes);
                    }
#pragma GCC unroll 4
                    for (int g = 0; g < G; g++) {
                      const Terms<A, KC, KP> v = f(i + g, p, lanes);
                      for (int k = 0; k < KC; k++) acc[g][k] += v.channel[k];
                      for (int k = 0; k < KP; k++) sums[k] += v.pixel[k];
                    }
                    for (int k = 0; k < KP; k++) store(pixel_sums + k * hw + p, sums[k], lanes);
                  });
                };
                offset == 0 ? run(std::true_type{}) : run(std::false_type{});
                for (int g = 0; g < G; g++) {
                  for (int k = 0; k < KC; k++) channel_sums[k * c + i + g] = sum_lanes(acc[g][k]);
                }
              });
    } else {
      std::fill_n(channel_sums, KC * c, A(0));
      by_four(end - first, [=]<int G>(int64_t offset, std::integral_constant<int, G>) {
        const int64_t p = first + offset;
        for (int64_t start = 0; start < c; start += blocks.kChannelsInRow) {
          std::array<Vecs<A, KP>, G> acc{};
          for_lanes<T>(std::min(c - start, blocks.kChannelsInRow), [&](int64_t at, auto lanes) CONVBLOCKS_LOOP {
            const int64_t i = start + at;
            Vecs<A, KC> sums{};
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
              const Terms<A, KC, KP> v = f(i, p + g, lanes);
              for (int k = 0; k < KC; k++) sums[k] += v.channel[k];
              for (int k = 0; k < KP; k++) acc[g][k] += v.pixel[k];
            }
            for (int k = 0; k < KC; k++) {
              A* const to = channel_sums + k * c + i;
              store(to, load(to, lanes) + sums[k], lanes);
            }
          });
          for (int g = 0; g < G; g++) {
            for (int k = 0; k < KP; k++) {
              A& total = by_pixel[k * hw + p + g];
              total = (start ? total : A(0)) + sum_lanes(acc[g][k]);
            }
          }
        }
      });
    }
  };
  const int64_t cost = (KC + KP) * std::min(hw, blocks.kPixels) * (kPlanes ? std::min(c, blocks.kChannels) : c);
  team.split(blocks.pixels * blocks.channels, cost, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) block(b % blocks.pixels, b / blocks.pixels);
  });
  if (blocks.pixels > 1) add_rows(by_channel, blocks.pixels, KC * c, channels);
  if (blocks.channels > 1) add_rows(by_pixel, blocks.channels, KP * hw, pixels);
}

}  // namespace convblocks::cpu
