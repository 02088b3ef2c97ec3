// Channels in the lanes of a vector: the pixels of up to kLanes<A> channels, gathered from a map of either layout into an
// array of vectors, one for each pixel, and back.
#pragma once
#include <tuple>
#include <utility>

#include "reduce.h"

namespace convblocks::cpu {

template <class A, int kBit, int... I>
inline std::pair<Vec<A>, Vec<A>> swap_lanes(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
  return {__builtin_shufflevector(a, b, (I & kBit ? I - kBit + L : I)...),
          __builtin_shufflevector(a, b, (I & kBit ? I + L : I + kBit)...)};
}

template <class A, int kBit>
inline void transpose_step(Vec<A>* v) {
  constexpr int L = kLanes<A>;
  if constexpr (kBit < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) {
      if (i & kBit) continue;
      std::tie(v[i], v[i + kBit]) = swap_lanes<A, kBit>(v[i], v[i + kBit], std::make_integer_sequence<int, L>{});
    }
    transpose_step<A, 2 * kBit>(v);
  }
}

// A square of vectors, its rows and columns exchanged.
template <class A>
inline void transpose(Vec<A>* v) {
  transpose_step<A, 1>(v);
}

// to[column][row] = from[row][column]; so many elements from one row to the next.
template <class A>
void transpose_into(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to, int64_t to_stride) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; i += L) {
    const int height = static_cast<int>(std::min<int64_t>(L, rows - i));
    for_lanes<A>(columns, [=](int64_t j, auto lanes) CONVBLOCKS_LOOP {
      const int64_t width = std::min<int64_t>(L, columns - j);
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) v[l] = l < height ? load(from + (i + l) * from_stride + j, lanes) : Vec<A>{};
      transpose<A>(v);
      A* const at = to + j * to_stride + i;
      for (int64_t l = 0; l < width; l++) {
        if (height == L)
          store(at + l * to_stride, v[l]);
        else
          store(at + l * to_stride, v[l], height);
      }
    });
  }
}

// The channels of a sample that share vectors, by their strides; the lanes from `count` on are zero.
template <class T>
struct LaneMap {
  T* data;
  int64_t channel, pixel;
  int count;
};

template <class T>
void gather_lanes(const LaneMap<const T>& from, int64_t begin, int64_t end, Acc<T>* to) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  const T* data = from.data + begin * from.pixel;
  const int64_t n = end - begin;
  if (from.pixel == 1) {
    for_lanes<T>(n, [=](int64_t p, auto lanes) {
      Vec<A> v[L];
      for (int l = 0; l < L; l++) v[l] = l < from.count ? load(data + l * from.channel + p, lanes) : Vec<A>{};
      transpose<A>(v);
      const int64_t pixels = std::min<int64_t>(L, n - p);
      for (int l = 0; l < pixels; l++) store(to + (p + l) * L, v[l]);
    });
  } else if (from.channel == 1 && from.count == L) {
    for (int64_t p = 0; p < n; p++) store(to + p * L, load(data + p * from.pixel));
  } else {
    for (int64_t p = 0; p < n; p++) {
      for (int l = 0; l < L; l++)
        to[p * L + l] = l < from.count ? static_cast<A>(data[p * from.pixel + l * from.channel]) : A(0);
    }
  }
}

template <class T>
void scatter_lanes(const Acc<T>* from, const LaneMap<T>& to, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  T* data = to.data + begin * to.pixel;
  const int64_t n = end - begin;
  if (to.pixel == 1) {
    for_lanes<T>(n, [=](int64_t p, auto lanes) {
      Vec<A> v[L];
      const int64_t pixels = std::min<int64_t>(L, n - p);
      for (int l = 0; l < L; l++) v[l] = l < pixels ? load(from + (p + l) * L) : Vec<A>{};
      transpose<A>(v);
      for (int l = 0; l < L; l++) {
        if (l < to.count) store(data + l * to.channel + p, v[l], lanes);
      }
    });
  } else if (to.channel == 1 && to.count == L) {
    for (int64_t p = 0; p < n; p++) store(data + p * to.pixel, load(from + p * L));
  } else {
    for (int64_t p = 0; p < n; p++) {
      for (int l = 0; l < to.count; l++) data[p * to.pixel + l * to.channel] = static_cast<T>(from[p * L + l]);
    }
  }
}

}  // namespace convblocks::cpu
