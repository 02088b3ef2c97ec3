// How the pixels of a sample are cut for the passes of global context over its maps, and sums by these chunks.
#pragma once
#include "reduce.h"

namespace convblocks::cpu {

// By the sizes only. A thread takes several chunks of planes together where the last cache holds them: what it then reads
// of a plane, or most of it, lies side by side.
template <class T>
struct Chunks {
  using A = Acc<T>;
  int64_t pixels, length, count, together;
  Chunks(int64_t c, int64_t hw, bool planes) : pixels(hw) {
    constexpr int64_t L = kLanes<T>;
    const int64_t bytes = c * sizeof(T);
    const int64_t most =
        planes ? std::clamp<int64_t>((384 << 10) / bytes, 64, 1024) : std::clamp<int64_t>((128 << 10) / bytes, 16, 256);
    const int64_t least = (hw + most - 1) / most, even = least > 1 ? (least + 1) / 2 * 2 : 1;
    length = ((hw + even - 1) / even + L - 1) / L * L;
    count = (hw + length - 1) / length;
    together = planes ? std::max<int64_t>(1, (1536 << 10) / (length * bytes)) : 1;
  }
  int64_t first(int64_t chunk) const { return std::min(pixels, chunk * length); }
  int64_t size(int64_t chunk, int64_t chunks = 1) const { return first(chunk + chunks) - first(chunk); }

  // Calls f(chunk, chunks) for all chunks, several at a time, which a team divides.
  template <class F>
  void each(const Team& team, int64_t cost, F f) const {
    // Compiled once, whoever calls it: two copies could round differently.
    team.split(count, length * cost, [=, *this](int64_t first, int64_t last) __attribute__((noinline)) {
      for (int64_t chunk = first; chunk < last; chunk += together) f(chunk, std::min(together, last - chunk));
    });
  }

  // Of planes: calls f(chunk, first channel, last) for the chunks in [chunk, last), a few channels of all of them at a time.
  template <class F>
  void each_plane(int64_t chunk, int64_t last, int64_t c, F f) const {
    constexpr int64_t G = std::max(1, kLanes<T> / 2);  // planes that reduce_planes takes together where they are short
    const int64_t some = last - chunk > 1 ? std::max<int64_t>(1, (256 / length + G - 1) / G * G) : c;
    for (int64_t channel = 0; channel < c; channel += some) {
      for (int64_t k = chunk; k < last; k++) f(k, channel, std::min(c, channel + some));
    }
  }

  // The sums over the pixels of chunks of K terms(x, y), of each of c channels, into partial[(chunk * K + k) * c + channel].
  template <int K, class F>
  void sum(int64_t chunk, int64_t last, int64_t c, const Map& x, const Map& y, int64_t sample, A* partial,
           F terms) const {
    const T *const v = row<T>(x, sample, 0), *const w = row<T>(y, sample, 0);
    if (x.pixel == 1) {
      each_plane(chunk, last, c, [=, this, step = x.channel, other = y.channel](int64_t k, int64_t begin, int64_t end) {
        reduce_planes<T, K>(begin, end, size(k), partial + k * K * c, c,
                            [=, from = first(k)](int64_t channel, int64_t p, auto lanes) CONVBLOCKS_LOOP {
                              return terms(load(v + channel * step + from + p, lanes),
                                           load(w + channel * other + from + p, lanes));
                            });
      });
    } else {
      for (int64_t k = chunk; k < last; k++) {
        sum_rows_of<T, K>(first(k), first(k) + size(k), c, partial + k * K * c,
                          [=, step = x.pixel, other = y.pixel](int64_t p, int64_t channel, auto lanes) CONVBLOCKS_LOOP {
                            return terms(load(v + p * step + channel, lanes), load(w + p * other + channel, lanes));
                          });
      }
    }
  }

  // out[i] = the sum over the chunks, in order, of partial[chunk * n + i] * factor(chunk). Of many from sums of few.
  template <class F>
  void merge(int64_t n, const A* partial, A* out, F factor) const {
    constexpr int64_t kFew = 32;
    for_lanes<A>(n, [=, this](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      Vec<A> total{};
      for (int64_t begin = 0; begin < count; begin += kFew) {
        Vec<A> sum{};
        for (int64_t k = begin; k < std::min(count, begin + kFew); k++) {
          sum += load(partial + k * n + i, lanes) * factor(k);
        }
        total += sum;
      }
      store(out + i, total, lanes);
    });
  }
};

}  // namespace convblocks::cpu
