// One row of a depthwise convolution, and of the gradient of its weights, with channels in the lanes. The map is one that
// lies in channels_last, or the vectors that gather_lanes has made of one that does not.
#pragma once
#include "gate.h"
#include "reduce.h"

namespace convblocks::cpu {

#define CONVBLOCKS_UNROLL _Pragma("GCC unroll 32")

// What is fetched before a tile comes to its columns: out, and the rows [begin, end) of those that the window meets.
struct Fetch {
  bool out = false;
  int64_t begin = 0, end = 0;
  bool any() const { return out || begin < end; }
};

// out[t] = activation(sum over i < rows and j < taps of in[i][first + t * stride + j * step] * weight[i][j] + bias), for
// t < count, in each channel; columns outside [0, width) count as zeros.
template <class S, class D>
struct Row {
  using A = Acc<S>;
  const S* in;  // the first of the rows that the window meets
  int64_t in_row, in_pixel;
  const A* weight;  // the tap that the first of them meets, of the first block of channels
  int64_t weight_row, weight_tap, weight_block;
  const A* bias;  // of the first block, `bias_block` apart; or null
  int64_t bias_block;
  int64_t rows, taps;
  int64_t first, stride, step, width;
  D* out;
  int64_t out_pixel, count;
  bool add;  // to what stands in out
  Activation activation;
  Fetch fetch = {};
  A* sums = nullptr;  // to which the results are added, a vector for each block of channels; or null
};

template <class A, int T>
__attribute__((noinline)) void activate_vectors(Vec<A>* v, Activation activation) {
  for (int t = 0; t < T; t++) v[t] = activate(v[t], activation);
}

// Whether activate_tile calls for it: of a whole row or plane it takes less time than of a tile.
inline bool takes_call(Activation activation) {
  return activation > Activation::relu6 && activation != Activation::none;
}
// The frequent ones in registers.
template <class V, int T>
CONVBLOCKS_LOOP inline void activate_tile(V (&acc)[T], Activation activation) {
  if (activation <= Activation::relu6) {
    const Lane<V> high = activation == Activation::relu ? INFINITY : 6;
    CONVBLOCKS_UNROLL
    for (int t = 0; t < T; t++) acc[t] = clamp(acc[t], 0, high);
  } else if (takes_call(activation)) {
    V active[T];
    for (int t = 0; t < T; t++) active[t] = acc[t];
    activate_vectors<Lane<V>, T>(active, activation);
    for (int t = 0; t < T; t++) acc[t] = active[t];
  }
}

// How many columns t results meet. CONVBLOCKS_UNROLL unrolls the loop over so many at most: else sums are in memory.
constexpr int tile_columns(int k, int stride, int t) { return (t - 1) * stride + k; }
constexpr int kMostUnrolled = 32;

// T columns from t0 on. K is the number of taps, of step 1, in a window with stride STRIDE; 0 where they are anything.
template <class S, class D, int K, int STRIDE, int T>
void convolve_tile(const Row<S, D>& r, int64_t t0, int64_t channels) {
  using A = Acc<S>;
  using V = Vec<A>;
  constexpr int L = kLanes<S>;
  constexpr int kColumns = tile_columns(K, STRIDE, T);
  static_assert(kColumns <= kMostUnrolled);
  const int count = static_cast<int>(std::min<int64_t>(T, r.count - t0));
  const int64_t first = r.first + t0 * r.stride;
  const A *weights = r.weight, *bias = r.bias;
  A* sums = r.sums;
  D* const out = r.out + t0 * r.out_pixel;
  int64_t fetched = 0;
  for (int64_t c = 0; c < channels; c += L, weights += r.weight_block) {
    const int64_t channel = std::min(c, channels - L);  // the last block overlaps the one before
    V acc[T];
    const V start = bias ? load(bias) : V{};
    if (bias) bias += r.bias_block;
    CONVBLOCKS_UNROLL
    for (int t = 0; t < T; t++) acc[t] = r.add && t < count ? load(out + t * r.out_pixel + channel) : start;
    const S* in = r.in + channel;
    const A* w = weights;
    if (STRIDE > 0 && r.fetch.any()) {  // of the next tile, as it lies, what is this block's share of it
      constexpr int kMet = std::max(K, STRIDE) - STRIDE;
      const int64_t stop = T * std::min<int64_t>(c + L, channels) / channels, some = stop - fetched;
      const int64_t next = (first + kMet + (T + fetched) * STRIDE) * r.in_pixel;
      for (int64_t i = r.fetch.begin; i < r.fetch.end; i++)
        fetch_rows(r.in + i * r.in_row + next, r.in_pixel, some * STRIDE, channels);
      if (r.fetch.out) fetch_rows(out + (T + fetched) * r.out_pixel, r.out_pixel, some, channels);
      fetched = stop;
    }
    for (int64_t i = 0; i < r.rows; i++, in += r.in_row, w += r.weight_row) {
      if constexpr (K > 0) {
        V tap[K];
        CONVBLOCKS_UNROLL
        for (int j = 0; j < K; j++) tap[j] = load(w + j * r.weight_tap);
        CONVBLOCKS_UNROLL
        for (int column = 0; column < kColumns; column++) {
          if (static_cast<uint64_t>(first + column) >= static_cast<uint64_t>(r.width)) continue;
          const V x = load(in + (first + column) * r.in_pixel);
          CONVBLOCKS_UNROLL
          for (int j = 0; j < K; j++) {
            const int t = (column - j) / STRIDE;
            if (column >= j && (column - j) % STRIDE == 0 && t < T) acc[t] += x * tap[j];
          }
        }
      } else {
        V line[T]{};  // a sum of its own: sums of many terms are built from sums of few
        for (int64_t j = 0; j < r.taps; j++) {
          const V tap = load(w + j * r.weight_tap);
          const int64_t column = first + j * r.step;
          CONVBLOCKS_UNROLL
          for (int t = 0; t < T; t++) {
            const int64_t at = column + t * r.stride;
            if (static_cast<uint64_t>(at) < static_cast<uint64_t>(r.width)) line[t] += load(in + at * r.in_pixel) * tap;
          }
        }
        CONVBLOCKS_UNROLL
        for (int t = 0; t < T; t++) acc[t] += line[t];
      }
    }
    activate_tile(acc, r.activation);
    CONVBLOCKS_UNROLL
    for (int t = 0; t < T; t++) {
      if (t < count) store(out + t * r.out_pixel + channel, acc[t]);
    }
    if (sums) {
      V sum{};
      CONVBLOCKS_UNROLL
      for (int t = 0; t < T; t++) sum += t < count ? acc[t] : V{};
      store(sums, load(sums) + sum);
      sums += L;
    }
  }
}

template <class S, class D, int K, int STRIDE, int T>
void convolve_tiles_of(const Row<S, D>& r, int64_t channels) {
  int64_t t = 0;
  // Registers for twice as many, whose sums do not wait for one another.
  if constexpr (kBytes == 64 && K >= 5 && tile_columns(K, STRIDE, 2 * T) <= kMostUnrolled) {
    for (; r.count - t > T; t += 2 * T) convolve_tile<S, D, K, STRIDE, 2 * T>(r, t, channels);
  }
  for (; t < r.count; t += T) convolve_tile<S, D, K, STRIDE, T>(r, t, channels);
}

template <class S, class D, int K, int STRIDE>
void convolve_tiles(const Row<S, D>& r, int64_t channels) {
  const int64_t sevens = (r.count + 6) / 7 * 7, eights = (r.count + 7) / 8 * 8;
  sevens <= eights ? convolve_tiles_of<S, D, K, STRIDE, 7>(r, channels)
                   : convolve_tiles_of<S, D, K, STRIDE, 8>(r, channels);
}

// Of `channels` channels, at least as many as a vector has lanes.
template <class S, class D>
void convolve_row(const Row<S, D>& r, int64_t channels) {
  const bool dense = r.step == 1 || r.taps == 1;
  const auto strided = [&]<int K>(std::integral_constant<int, K>) {
    if (r.stride == 1) return convolve_tiles<S, D, K, 1>(r, channels);
    if (r.stride == 2) return convolve_tiles<S, D, K, 2>(r, channels);
    convolve_tiles<S, D, 0, 0>(r, channels);
  };
  // A pixel meets so many taps of a kernel of 3 with stride 2.
  if (dense && r.stride == 1 && r.taps == 1) return convolve_tiles<S, D, 1, 1>(r, channels);
  if (dense && r.stride == 1 && r.taps == 2) return convolve_tiles<S, D, 2, 1>(r, channels);
  if (dense && r.taps == 3) return strided(std::integral_constant<int, 3>{});
  if (dense && r.taps == 5) return strided(std::integral_constant<int, 5>{});
  if (dense && r.taps == 7) return strided(std::integral_constant<int, 7>{});
  convolve_tiles<S, D, 0, 0>(r, channels);
}

// Adds to sums[i][j] of each block of channels: grad[t] * in[i][first + t * stride + j * step], summed over t < count.
template <class S>
struct Correlation {
  using A = Acc<S>;
  const S* in;
  int64_t in_row, in_pixel;
  const S* grad;
  int64_t grad_pixel;
  A* sums;
  int64_t sums_row, sums_block;  // taps lie one vector apart
  A* grad_sums;                  // the sum of grad of each block, `sums_block` apart; or null
  int64_t rows, taps;
  int64_t first, stride, step, width, count;
  int64_t rows_ahead = 0;  // how many rows after those are fetched
};

// T columns from t0 on, all of them there.
template <class S, int K, int STRIDE, int T>
CONVBLOCKS_LOOP inline void correlate_tile(const Correlation<S>& r, const S* in, const S* grad, int64_t t0,
                                           Vec<Acc<S>>* acc) {
  using V = Vec<Acc<S>>;
  V g[T];
  CONVBLOCKS_UNROLL
  for (int t = 0; t < T; t++) g[t] = load(grad + (t0 + t) * r.grad_pixel);
  const int64_t first = r.first + t0 * STRIDE;
  CONVBLOCKS_UNROLL
  for (int column = 0; column < (T - 1) * STRIDE + K; column++) {
    if (static_cast<uint64_t>(first + column) >= static_cast<uint64_t>(r.width)) continue;
    const V x = load(in + (first + column) * r.in_pixel);
    CONVBLOCKS_UNROLL
    for (int j = 0; j < K; j++) {
      const int t = (column - j) / STRIDE;
      if (column >= j && (column - j) % STRIDE == 0 && t < T) acc[j] += x * g[t];
    }
  }
}

template <class S, int K, int STRIDE>
void correlate_block(const Correlation<S>& r, const S* in, const S* grad, Acc<S>* sums) {
  using V = Vec<Acc<S>>;
  constexpr int L = kLanes<S>;
  for (int64_t i = 0; i < r.rows; i++, in += r.in_row, sums += r.sums_row) {
    V acc[K]{};
    int64_t t = 0;
    for (; t + 7 <= r.count; t += 7) correlate_tile<S, K, STRIDE, 7>(r, in, grad, t, acc);
    for (; t < r.count; t++) correlate_tile<S, K, STRIDE, 1>(r, in, grad, t, acc);
    CONVBLOCKS_UNROLL
    for (int j = 0; j < K; j++) store(sums + j * L, load(sums + j * L) + acc[j]);
  }
}

// The same for any taps, one by one.
template <class S>
void correlate_any(const Correlation<S>& r, const S* in, const S* grad, Acc<S>* sums) {
  using V = Vec<Acc<S>>;
  constexpr int L = kLanes<S>, kChains = 4;
  for (int64_t i = 0; i < r.rows; i++, in += r.in_row, sums += r.sums_row) {
    for (int64_t j = 0; j < r.taps; j++) {
      const int64_t column = r.first + j * r.step;
      const int64_t begin = column < 0 ? (-column + r.stride - 1) / r.stride : 0;
      const int64_t end = column < r.width ? std::min(r.count, (r.width - column - 1) / r.stride + 1) : 0;
      const S* x = in + column * r.in_pixel;
      V acc[kChains]{};
      int64_t t = begin;
      for (; t + kChains <= end; t += kChains) {
        for (int k = 0; k < kChains; k++)
          acc[k] += load(x + (t + k) * r.stride * r.in_pixel) * load(grad + (t + k) * r.grad_pixel);
      }
      for (; t < end; t++) acc[0] += load(x + t * r.stride * r.in_pixel) * load(grad + t * r.grad_pixel);
      store(sums + j * L, load(sums + j * L) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
    }
  }
}

template <class S>
void correlate_row(const Correlation<S>& r, int64_t channels) {
  constexpr int L = kLanes<S>;
  auto run = correlate_any<S>;
  if (r.step == 1 && r.stride == 1) {
    if (r.taps == 3) run = correlate_block<S, 3, 1>;
    if (r.taps == 5) run = correlate_block<S, 5, 1>;
    if (r.taps == 7) run = correlate_block<S, 7, 1>;
  } else if (r.step == 1 && r.stride == 2) {
    if (r.taps == 3) run = correlate_block<S, 3, 2>;
    if (r.taps == 5) run = correlate_block<S, 5, 2>;
    if (r.taps == 7) run = correlate_block<S, 7, 2>;
  }
  Acc<S>*sums = r.sums, *grad_sums = r.grad_sums;
  int64_t fetched = 0;
  for (int64_t c = 0; c < channels; c += L, sums += r.sums_block) {
    const int64_t channel = std::min(c, channels - L);
    const int64_t stop = r.rows_ahead ? r.width * std::min<int64_t>(c + L, channels) / channels : 0;
    for (int64_t i = 0; i < r.rows_ahead; i++)
      fetch_rows(r.in + (r.rows + i) * r.in_row + fetched * r.in_pixel, r.in_pixel, stop - fetched, channels);
    fetched = stop;
    run(r, r.in + channel, r.grad + channel, sums);
    if (!grad_sums) continue;
    Vec<Acc<S>> total{};
    for (int64_t t = 0; t < r.count; t++) total += load(r.grad + channel + t * r.grad_pixel);
    store(grad_sums, load(grad_sums) + total);
    grad_sums += r.sums_block;
  }
}

}  // namespace convblocks::cpu
