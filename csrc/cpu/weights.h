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
    for_lanes<W>(count, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      if constexpr (std::is_same_v<A, float>) store(copy + i, load(from + i, lanes), lanes);
    });
  };
  if (dtype == Dtype::f16) convert(static_cast<const f16*>(data));
  if (dtype == Dtype::bf16) convert(static_cast<const bf16*>(data));
  return copy;
}

// Where the `count` numbers of a parameter's gradient are written as A: in place if they are so stored, else in workspace,
// and rounded to its dtype at the end of the scope. Null where the parameter has no gradient.
template <class A>
class Narrowed {
 public:
  Narrowed(const Context& context, void* data, Dtype dtype, int64_t count) : data_(data), dtype_(dtype), count_(count) {
    const bool here = !data || dtype == Dtype::f32 || dtype == Dtype::f64;
    at_ = static_cast<A*>(here ? data : context.workspace(context, count * sizeof(A)));
  }
  Narrowed(const Narrowed&) = delete;
  ~Narrowed() {
    if (at_ == data_) return;
    const auto round = [this]<class W>(W* to) {
      for_lanes<W>(count_, [=, from = at_](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        if constexpr (std::is_same_v<A, float>) store(to + i, load(from + i, lanes), lanes);
      });
    };
    if (dtype_ == Dtype::f16) round(static_cast<f16*>(data_));
    if (dtype_ == Dtype::bf16) round(static_cast<bf16*>(data_));
  }
  operator A*() const { return at_; }

 private:
  void* data_;
  Dtype dtype_;
  int64_t count_;
  A* at_;
};

template <class A>
A dot(const A* a, const A* b, int64_t n) {
  return reduce_plane<A, 1>(
      n, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP { return Vecs<A, 1>{load(a + i, lanes) * load(b + i, lanes)}; })[0];
}

// Calls f(first, std::integral_constant<int, G>) for groups of 4, 2 and 1: a weight loaded once serves the whole group.
template <class F>
void by_groups(int64_t count, F f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f(i, std::integral_constant<int, 4>{});
  for (; i + 2 <= count; i += 2) f(i, std::integral_constant<int, 2>{});
  for (; i < count; i++) f(i, std::integral_constant<int, 1>{});
}

// The same for groups of 4 and 1.
template <class F>
CONVBLOCKS_LOOP inline void by_four(int64_t count, F f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f(i, std::integral_constant<int, 4>{});
  for (; i < count; i++) f(i, std::integral_constant<int, 1>{});
}

// The sums over the columns of R rows of w times each of G vectors, into out[vector][row].
template <int R, int G, class A>
void products(int64_t cols, const A* w, const A* in, int64_t in_stride, A* out) {
  constexpr int L = kLanes<A>;
  constexpr int64_t kBlock = 64 * L;
  const auto add = [=](Vec<A>* sums, int64_t first, int64_t count) CONVBLOCKS_LOOP {
    for_lanes<A>(count, [=, w = w + first, in = in + first](int64_t j, auto lanes) CONVBLOCKS_LOOP {
      Vec<A> v[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) v[g] = load(in + g * in_stride + j, lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const Vec<A> weight = load(w + r * cols + j, lanes);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) sums[g * R + r] += weight * v[g];
      }
    });
  };
  Vec<A> total[std::max(L, R * G)]{};
  if (cols <= kBlock) {
    add(total, 0, cols);
  } else {
    for (int64_t first = 0; first < cols; first += kBlock) {  // sums of many terms from sums of few
      Vec<A> sums[R * G]{};
      add(sums, first, std::min(kBlock, cols - first));
      for (int i = 0; i < R * G; i++) total[i] += sums[i];
    }
  }
  if constexpr (R * G <= L) {
    store(out, sum_each(total), Full{});
  } else {
    for (int i = 0; i < R * G; i++) out[i] = sum_lanes(total[i]);
  }
}

// out_s = w in_s + b for each of `count` samples s, whose vectors lie `in_stride` and `out_stride` apart; w is (rows, cols).
template <class A>
void linear(int64_t count, int64_t rows, int64_t cols, const A* w, const A* b, const A* in, int64_t in_stride, A* out,
            int64_t out_stride) {
  by_groups(count, [&]<int G>(int64_t first, std::integral_constant<int, G>) {
    const auto put = [&]<int R>(int64_t i, std::integral_constant<int, R>) {
      A sums[std::max(kLanes<A>, R * G)];
      products<R, G>(cols, w + i * cols, in + first * in_stride, in_stride, sums);
      for (int g = 0; g < G; g++) {
        for (int r = 0; r < R; r++) out[(first + g) * out_stride + i + r] = sums[g * R + r] + (b ? b[i + r] : A(0));
      }
    };
    constexpr int R = std::clamp(kLanes<A> / G, 1, 8);
    int64_t i = 0;
    for (; i + R <= rows; i += R) put(i, std::integral_constant<int, R>{});
    for (; i < rows; i++) put(i, std::integral_constant<int, 1>{});
  });
}

// Calls put(g, j, lanes, the sum over i < rows of left(i, g) * w[i * cols + j]) for all g < G and j < cols. Sums of many
// rows are built from sums of few, which lose less to rounding.
template <int G, class A, class Left, class Put>
void sum_rows(int64_t rows, int64_t cols, const A* w, Left left, Put put) {
  constexpr int kStep = 4, L = kLanes<A>;
  constexpr int64_t kRows = 64;
  int64_t j = 0;
  for (; j + kStep * L <= cols; j += kStep * L) {
    Vec<A> total[G][kStep]{};
    for (int64_t first = 0; first < rows; first += kRows) {
      Vec<A> acc[G][kStep]{};
      for (int64_t i = first; i < std::min(rows, first + kRows); i++) {
#pragma GCC unroll 4
        for (int s = 0; s < kStep; s++) {
          const Vec<A> weight = load(w + i * cols + j + s * L);
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) acc[g][s] += left(i, g) * weight;
        }
      }
      for (int g = 0; g < G; g++) {
        for (int s = 0; s < kStep; s++) total[g][s] += acc[g][s];
      }
    }
    for (int g = 0; g < G; g++) {
      for (int s = 0; s < kStep; s++) put(g, j + s * L, Full{}, total[g][s]);
    }
  }
  for_lanes<A>(cols - j, [=](int64_t offset, auto lanes) CONVBLOCKS_LOOP {
    Vec<A> total[G]{};
    for (int64_t first = 0; first < rows; first += kRows) {
      Vec<A> acc[G]{};
      for (int64_t i = first; i < std::min(rows, first + kRows); i++) {
        const Vec<A> weight = load(w + i * cols + j + offset, lanes);
        for (int g = 0; g < G; g++) acc[g] += left(i, g) * weight;
      }
      for (int g = 0; g < G; g++) total[g] += acc[g];
    }
    for (int g = 0; g < G; g++) put(g, j + offset, lanes, total[g]);
  });
}

// grad_w (rows, cols) = sum over the n samples of left[n] (rows) x right[n] (cols), and grad_b (rows) = that of left.
template <class A>
void sum_of_products(const Context& context, int64_t n, int64_t rows, int64_t cols, const A* left, const A* right,
                     std::type_identity_t<A>* grad_w, std::type_identity_t<A>* grad_b) {
  parallel_for(context, rows, std::max<int64_t>(4, 16384 / (n * cols)), [&](int64_t begin, int64_t end) {
    by_groups(end - begin, [&]<int G>(int64_t offset, std::integral_constant<int, G>) {
      const int64_t first = begin + offset;
      sum_rows<G, A>(
          n, cols, right, [&](int64_t sample, int g) { return left[sample * rows + first + g]; },
          [&](int g, int64_t j, auto lanes, Vec<A> sum) { store(grad_w + (first + g) * cols + j, sum, lanes); });
    });
    for (int64_t i = begin; grad_b && i < end; i++) {
      A sum = 0;
      for (int64_t sample = 0; sample < n; sample++) sum += left[sample * rows + i];
      grad_b[i] = sum;
    }
  });
}

}  // namespace convblocks::cpu
