// What the pixels of a map weigh: sums over their channels, in both layouts.
#pragma once
#include "reduce.h"

namespace convblocks::cpu {

// Calls f(first, std::integral_constant<int, S>) for as many pixels as a vector has lanes, and then for fewer.
template <int L, class F>
CONVBLOCKS_LOOP inline void by_rows(int64_t pixels, F f) {
  int64_t p = 0;
  for (; p + L <= pixels; p += L) f(p, std::integral_constant<int, L>{});
  if constexpr (L > 4) {
    for (; p + 4 <= pixels; p += 4) f(p, std::integral_constant<int, 4>{});
  }
  for (; p < pixels; p++) f(p, std::integral_constant<int, 1>{});
}

// out[p] = bias + the sum over the channels i of weight[i] * (x[i][p] - center[i]), for `pixels` pixels from x on.
// Without a center, which is null then, of weight[i] * x[i][p].
template <bool kCentered, class T>
void weigh_channels(const T* x, const Map& map, int64_t pixels, int64_t c, const Acc<T>* weight, const Acc<T>* center,
                    Acc<T> bias, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  if (map.pixel == 1) {
    std::fill_n(out, pixels, bias);
    const auto add = [=]<int K>(int64_t i, std::integral_constant<int, K>) CONVBLOCKS_LOOP {
      for_lanes<T>(pixels, [=, from = x + i * map.channel, w = weight + i](int64_t p, auto lanes) CONVBLOCKS_LOOP {
        const auto value = [=](int k) CONVBLOCKS_LOOP {
          const Vec<A> v = load(from + k * map.channel + p, lanes);
          return kCentered ? v - center[i + k] : v;
        };
        Vec<A> sum = value(0) * w[0];
#pragma GCC unroll 8
        for (int k = 1; k < K; k++) sum += value(k) * w[k];
        store(out + p, load(out + p, lanes) + sum, lanes);
      });
    };
    int64_t i = 0;
    for (; i + 8 <= c; i += 8) add(i, std::integral_constant<int, 8>{});
    for (; i < c; i++) add(i, std::integral_constant<int, 1>{});
    return;
  }
  const auto rows = [=]<int S>(int64_t p, std::integral_constant<int, S>) CONVBLOCKS_LOOP {
    Vec<A> sums[L]{};
    const T* from = x + p * map.pixel;
    for_lanes<T>(c, [&, from, weight, center](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> w = load(weight + i, lanes), mean = kCentered ? load(center + i, lanes) : Vec<A>{};
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) {
        const Vec<A> v = load(from + s * map.pixel + i, lanes);
        sums[s] += (kCentered ? v - mean : v) * w;
      }
    });
    const Vec<A> result = sum_each(sums) + bias;
    if constexpr (S == L)
      store(out + p, result);
    else
      store(out + p, result, S);
  };
  by_rows<L>(pixels, rows);
}

}  // namespace convblocks::cpu
