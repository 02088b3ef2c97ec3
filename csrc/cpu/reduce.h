// Sums over the pixels of each channel, for the two layouts. What is summed is a function of the pixel that returns one
// vector for each sum; several sums share one read. The order of the additions depends on the sizes only, never on the
// number of threads, and sums of many terms are built from sums of few.
#pragma once
#include <array>

#include "caches.h"
#include "team.h"
#include "vec.h"

namespace convblocks::cpu {

template <class A, int K>
using Vecs = std::array<Vec<A>, K>;

template <class T>
T* row(const Map& map, int64_t sample, int64_t channel, int64_t pixel = 0) {
  return static_cast<T*>(map.data) + sample * map.batch + channel * map.channel + pixel * map.pixel;
}

// Says "all lanes" where a count of lanes stands at the end of a row.
struct Full {};
template <class T>
inline Vec<Acc<T>> load(const T* p, Full, Acc<T> = 0) {
  return load(p);
}
template <class T>
inline void store(T* p, Vec<Acc<T>> v, Full) {
  store(p, v);
}

// Calls f(i, lanes) over [0, n): a vector at a time, then once with the count that is left.
template <class T, class F>
CONVBLOCKS_LOOP inline void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, Full{});
  if (i < n) f(i, static_cast<int>(n - i));
}

// Writes f(i, lanes) to the n elements at `to`. A row that will not be in a cache when it is read next goes past them.
template <class T, class F>
CONVBLOCKS_LOOP inline void write_row(T* to, int64_t n, bool past_caches, F f) {
  if (!past_caches) {
    for_lanes<T>(n, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP { store(to + i, f(i, lanes), lanes); });
    return;
  }
  constexpr size_t size = kLanes<T> * sizeof(T);
  const auto misaligned = reinterpret_cast<uintptr_t>(to) % size;
  int64_t i = std::min<int64_t>(n, misaligned ? (size - misaligned) / sizeof(T) : 0);
  if (i) store(to, f(int64_t{0}, static_cast<int>(i)), static_cast<int>(i));
  for (; i + kLanes<T> <= n; i += kLanes<T>) store_past_caches(to + i, f(i, Full{}));
  if (i < n) store(to + i, f(i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// The same down a column: f(pixel) to the vector, or the part of one that `lanes` says, at `to` of each pixel.
template <class T, class L, class F>
CONVBLOCKS_LOOP inline void write_column(T* to, int64_t stride, int64_t begin, int64_t end, L lanes, bool past_caches,
                                         F f) {
  constexpr size_t size = kLanes<T> * sizeof(T);
  if constexpr (std::is_same_v<L, Full> && size == 64) {  // a line of the cache: parts of one would be slow
    if (past_caches && reinterpret_cast<uintptr_t>(to) % size == 0 && stride * sizeof(T) % size == 0) {
      for (int64_t p = begin; p < end; p++) store_past_caches(to + p * stride, f(p));
      return;
    }
  }
  for (int64_t p = begin; p < end; p++) store(to + p * stride, f(p), lanes);
}

// NCHW: the K sums of f(i, lanes) -> Vecs<A, K> over the n pixels of a plane.
template <class T, int K, class F>
CONVBLOCKS_LOOP inline std::array<Acc<T>, K> reduce_plane(int64_t n, F f) {
  using A = Acc<T>;
  constexpr int kStep = 4, L = kLanes<T>;
  constexpr int64_t kBlock = 64 * kStep * L;
  const auto block = [=](int64_t begin, int64_t end) CONVBLOCKS_LOOP {
    std::array<Vecs<A, K>, kStep> acc{};
    int64_t i = begin;
    for (; i + kStep * L <= end; i += kStep * L) {
#pragma GCC unroll 4
      for (int s = 0; s < kStep; s++) {
        const Vecs<A, K> v = f(i + s * L, Full{});
        for (int k = 0; k < K; k++) acc[s][k] += v[k];
      }
    }
    for (; i + L <= end; i += L) {
      const Vecs<A, K> v = f(i, Full{});
      for (int k = 0; k < K; k++) acc[0][k] += v[k];
    }
    if (i < end) {
      const Vecs<A, K> v = f(i, static_cast<int>(end - i));
      for (int k = 0; k < K; k++) acc[1][k] += v[k];
    }
    std::array<A, K> sums;
    for (int k = 0; k < K; k++) sums[k] = sum_lanes((acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k]));
    return sums;
  };
  std::array<double, K> total{};  // exact where there is one block
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const std::array<A, K> sums = block(begin, std::min(n, begin + kBlock));
    for (int k = 0; k < K; k++) total[k] += sums[k];
  }
  std::array<A, K> result;
  for (int k = 0; k < K; k++) result[k] = static_cast<A>(total[k]);
  return result;
}

// The same for G planes together: the K sums of f(plane, i, lanes) into out[k * stride + plane]. What the sums of a vector's
// lanes cost is shared, which is most of the work on short planes.
template <class T, int K, int G, class F>
CONVBLOCKS_LOOP inline void reduce_together(int64_t n, Acc<T>* out, int64_t stride, F f) {
  using A = Acc<T>;
  Vecs<A, K> acc[G]{};
  for_lanes<T>(n, [&, f](int64_t i, auto lanes) CONVBLOCKS_LOOP {
#pragma GCC unroll 16
    for (int g = 0; g < G; g++) {
      const Vecs<A, K> v = f(g, i, lanes);
      for (int k = 0; k < K; k++) acc[g][k] += v[k];
    }
  });
  for (int k = 0; k < K; k++) {
    Vec<A> sums[kLanes<A>]{};
    for (int g = 0; g < G; g++) sums[g] = acc[g][k];
    store(out + k * stride, sum_each(sums), G);
  }
}

// And for the planes in [begin, end), of n pixels each; how a plane is summed depends on n only.
template <class T, int K, class F>
CONVBLOCKS_LOOP inline void reduce_planes(int64_t begin, int64_t end, int64_t n, Acc<T>* out, int64_t stride, F f) {
  constexpr int64_t kShort = 8 * kLanes<T>;  // longer sums are more exact in the accumulators of reduce_plane
  constexpr int G = std::max(1, kLanes<T> / 2);
  int64_t first = begin;
  const auto together = [=]<int N>(int64_t at, std::integral_constant<int, N>) CONVBLOCKS_LOOP {
    reduce_together<T, K, N>(n, out + at, stride,
                             [=](int g, int64_t i, auto lanes) CONVBLOCKS_LOOP { return f(at + g, i, lanes); });
  };
  if (n <= kShort) {
    for (; first + G <= end; first += G) together(first, std::integral_constant<int, G>{});
    for (; first < end; first++) together(first, std::integral_constant<int, 1>{});
  }
  for (; first < end; first++) {
    const auto sums =
        reduce_plane<T, K>(n, [=, plane = first](int64_t i, auto lanes) CONVBLOCKS_LOOP { return f(plane, i, lanes); });
    for (int k = 0; k < K; k++) out[k * stride + first] = sums[k];
  }
}

// channels_last: the K sums of f(pixel, channel, lanes) -> Vecs<A, K> over the pixels, for each of c channels, into
// out[k * c + channel]. `partial` is workspace of row_sums_size elements.
inline constexpr int64_t kPixelChunk = 128;
inline int64_t pixel_chunks(int64_t pixels) { return (pixels + kPixelChunk - 1) / kPixelChunk; }
template <int K>
inline int64_t row_sums_size(int64_t pixels, int64_t c) {
  return pixel_chunks(pixels) * K * c;
}

// Those over the pixels in [begin, end) into `sums`.
template <class T, int K, class F>
CONVBLOCKS_LOOP inline void sum_rows_of(int64_t begin, int64_t end, int64_t c, Acc<T>* sums, F f) {
  using A = Acc<T>;
  constexpr int kStep = 4;
  std::fill_n(sums, K * c, A(0));
  const auto rows = [=]<int S>(int64_t p, std::integral_constant<int, S>) CONVBLOCKS_LOOP {
    for_lanes<T>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      Vecs<A, K> acc = f(p, i, lanes);
#pragma GCC unroll 4
      for (int s = 1; s < S; s++) {
        const Vecs<A, K> v = f(p + s, i, lanes);
        for (int k = 0; k < K; k++) acc[k] += v[k];
      }
      for (int k = 0; k < K; k++) store(sums + k * c + i, load(sums + k * c + i, lanes) + acc[k], lanes);
    });
  };
  int64_t p = begin;
  for (; p + kStep <= end; p += kStep) rows(p, std::integral_constant<int, kStep>{});
  for (; p < end; p++) rows(p, std::integral_constant<int, 1>{});
}

template <class T, int K, class F>
CONVBLOCKS_LOOP inline void reduce_rows(const Team& team, int64_t pixels, int64_t c, Acc<T>* partial, Acc<T>* out,
                                        F f) {
  using A = Acc<T>;
  const int64_t chunks = pixel_chunks(pixels);
  team.split(chunks, kPixelChunk * c, [=](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; chunk++) {
      const int64_t end = std::min(pixels, (chunk + 1) * kPixelChunk);
      sum_rows_of<T, K>(chunk * kPixelChunk, end, c, partial + chunk * K * c, f);
    }
  });
  for_lanes<A>(K * c, [=](int64_t i, auto lanes) {
    Vec<A> total = load(partial + i, lanes);
    for (int64_t chunk = 1; chunk < chunks; chunk++) total += load(partial + chunk * K * c + i, lanes);
    store(out + i, total, lanes);
  });
}

// Fetches rows that are read or written soon, after others. In place: of a function that does nothing else compilers leave
// out the call.
template <class T>
CONVBLOCKS_LOOP inline void fetch_rows(const T* from, int64_t step, int64_t rows, int64_t length) {
  for (int64_t p = 0; p < rows; p++) {
    for (int64_t i = 0; i < length; i += 64 / sizeof(T)) __builtin_prefetch(from + p * step + i);
  }
}

}  // namespace convblocks::cpu
