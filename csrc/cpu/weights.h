// Small dense weights in the precision of the sums, and their products with vectors.
#pragma once
#include "reduce.h"

namespace convblocks::cpu {

// `count` weights as A: where they are, if they are so stored, else a copy in workspace. Null stays null.
template <class A>
const A* widened(const Context& context, const void* data, Dtype dtype, int64_t count) {
  if (!data || dtype == Dtype::f32 || dtype == Dtype::f64) return static_cast<const A*>(data);
  A* copy = static_cast<A*>(context.workspace(context, count * sizeof(A)));
  const auto convert = [&]<class W>(const W* from) {
    for_lanes<W>(count, [&](int64_t i, auto lanes) {
      if constexpr (std::is_same_v<A, float>) store(copy + i, load(from + i, lanes), lanes);
    });
  };
  if (dtype == Dtype::f16) convert(static_cast<const f16*>(data));
  if (dtype == Dtype::bf16) convert(static_cast<const bf16*>(data));
  return copy;
}

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[2]{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    acc[0] += load(a + i) * load(b + i);
    acc[1] += load(a + i + L) * load(b + i + L);
  }
  for (; i + L <= n; i += L) acc[0] += load(a + i) * load(b + i);
  if (i < n) acc[1] += load(a + i, static_cast<int>(n - i)) * load(b + i, static_cast<int>(n - i));
  return sum_lanes(acc[0] + acc[1]);
}

// Calls store(j, lanes, sum over i < rows of left(i) * w[i * cols + j]) for all j < cols.
template <class A, class Left, class Store>
void sum_rows(int64_t rows, int64_t cols, const A* w, int64_t stride, Left left, Store put) {
  constexpr int kStep = 4, L = kLanes<A>;
  int64_t j = 0;
  for (; j + kStep * L <= cols; j += kStep * L) {
    Vec<A> acc[kStep]{};
    for (int64_t i = 0; i < rows; i++) {
      for (int s = 0; s < kStep; s++) acc[s] += left(i) * load(w + i * stride + j + s * L);
    }
    for (int s = 0; s < kStep; s++) put(j + s * L, Full{}, acc[s]);
  }
  for_lanes<A>(cols - j, [&](int64_t offset, auto lanes) {
    Vec<A> acc{};
    for (int64_t i = 0; i < rows; i++) acc += left(i) * load(w + i * stride + j + offset, lanes);
    put(j + offset, lanes, acc);
  });
}

// grad_w (rows, cols) = sum over the n samples of left[n] (rows) x right[n] (cols), and grad_b (rows) = that of left.
template <class W, class A>
void sum_of_products(const Context& context, int64_t n, int64_t rows, int64_t cols, const A* left, const A* right,
                     W* grad_w, W* grad_b) {
  parallel_for(context, rows, std::max<int64_t>(1, 16384 / (n * cols)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      sum_rows<A>(
          n, cols, right, cols, [&](int64_t sample) { return left[sample * rows + i]; },
          [&](int64_t j, auto lanes, Vec<A> sum) { store(grad_w + i * cols + j, sum, lanes); });
      if (grad_b) {
        A sum = 0;
        for (int64_t sample = 0; sample < n; sample++) sum += left[sample * rows + i];
        grad_b[i] = static_cast<W>(sum);
      }
    }
  });
}

}  // namespace convblocks::cpu
