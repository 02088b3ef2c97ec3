// Tiles of a dense convolution, pixels by vectors of output channels: their sizes, where they go, and the sums of those that
// lie in a line.
#pragma once
#include <algorithm>

#include "../dense_conv2d.h"
#include "gate.h"
#include "reduce.h"

namespace convblocks::cpu {

// The pixels of a group are taken V vectors of output channels at a time, kGroup / V of them: what the registers hold.
// kPanel: how many vectors if there are enough.
// kLine: of a line, where taps share what is read, of up to kLineVectors.
#if defined(__AVX512F__)
constexpr int kGroup = 24, kPanel = 4, kLine = 14, kLineVectors = 2;
#else
constexpr int kGroup = 12, kPanel = 2, kLine = 7, kLineVectors = 1;
#endif
constexpr int kMost = std::max(3, kPanel);

// Where a pixel of the output is, and what is added to it, or null.
template <class A>
struct TileOutput {
  A* y;
  const A* residual;
};

// The output channels from o on, of `count` pixels, from their sums.
template <int R, int V, class A, class Kind>
CONVBLOCKS_LOOP inline void finish_tile(Vec<A> (&acc)[R][V], const DenseConv2dArgs& a, int64_t o,
                                        const TileOutput<A>* outputs, int count, Kind activation) {
  constexpr int L = kLanes<A>;
  const A* const shift = a.shift ? static_cast<const A*>(a.shift) + o : nullptr;
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const int lanes = static_cast<int>(std::min<int64_t>(L, a.out_c - o - v * L));
    const Vec<A> offset = shift ? load(shift + v * L, lanes) : Vec<A>{};
#pragma GCC unroll 24
    for (int r = 0; r < R; r++) {
      if (r >= count) break;
      const auto [y, residual] = outputs[r];
      const int64_t at = o + v * L;
      Vec<A> z = acc[r][v] + offset;
      if (lanes == L) {
        if (residual) z += load(residual + at);
        store(y + at, activate(z, activation));
      } else {
        if (residual) z += load(residual + at, lanes);
        store(y + at, activate(z, activation), lanes);
      }
    }
  }
}

// Adds up R pixels of a line, for a kernel 3 wide of `rows` rows, which lie `step` apart in the padded input. A value of
// the input is read once for the three taps that it has.
template <class A, int R, int V>
CONVBLOCKS_LOOP inline void sum_line(Vec<A> (&acc)[R][V], const A* from, const A* weights, int64_t c, int64_t rows,
                                     int64_t step) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; i++, from += step, weights += 3 * c * V * L) {
    for (int64_t j = 0; j < c; j++) {
      Vec<A> w[3][V];
#pragma GCC unroll 3
      for (int k = 0; k < 3; k++) {
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) w[k][v] = load(weights + ((k * c + j) * V + v) * L);
      }
      const A* at = from + j;
#pragma GCC unroll 16
      for (int r = 0; r < R + 2; r++, at += c) {
        const Vec<A> value = splat<Vec<A>>(*at);
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) {
          if (r < R) acc[r][v] += value * w[0][v];
          if (r >= 1 && r <= R) acc[r - 1][v] += value * w[1][v];
          if (r >= 2) acc[r - 2][v] += value * w[2][v];
        }
      }
    }
  }
}

}  // namespace convblocks::cpu
