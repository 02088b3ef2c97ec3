// The last pass of global context's backward over the maps of a sample: the gradient of x, and what that of the
// attention's weight is made of.
#pragma once
#include "context_pool.h"

namespace convblocks::cpu {

// Of some pixels of a sample: where they are, and what is made of their channels.
template <class T>
struct ContextGradient {
  using A = Acc<T>;
  Map x, grad, grad_x;
  int64_t sample, first, c;
  bool far;
  const A *scale, *context, *grad_context, *weight;

  // From attention and dz to grad_x and the share in the gradient of the attention's weight.
  void planes(int64_t pixels, const A* attention, const A* dz, A* out) const {
    constexpr int L = kLanes<T>;
    for (int64_t begin = 0; begin < c; begin += L) {
      Vec<A> sums[L]{};
      const int64_t count = std::min<int64_t>(L, c - begin);
      for (int64_t k = 0; k < count; k++) {
        const int64_t channel = begin + k;
        const T *v = row<T>(x, sample, channel, first), *g = row<T>(grad, sample, channel, first);
        const A mean = context[channel], by_grad = scale[channel], by_attention = grad_context[channel];
        const A by_dz = weight[channel];
        Vec<A> sum{};
        write_row<T>(row<T>(grad_x, sample, channel, first), pixels, far,
                     [=, &sum](int64_t p, auto lanes) CONVBLOCKS_LOOP {
                       const Vec<A> d = load(dz + p, lanes);
                       sum += (load(v + p, lanes) - mean) * d;
                       return load(g + p, lanes) * by_grad + load(attention + p, lanes) * by_attention + d * by_dz;
                     });
        sums[k] = sum;
      }
      store(out + begin, sum_each(sums), static_cast<int>(count));
    }
  }

  void rows(int64_t pixels, const A* attention, const A* dz, A* out) const {
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) some_rows<4>(p, attention + p, dz + p, out);
    for (; p < pixels; p++) some_rows<1>(p, attention + p, dz + p, out);
  }

 private:
  template <int S>
  void some_rows(int64_t p, const A* attention, const A* dz, A* out) const {
    const T *const v = row<T>(x, sample, 0, first + p), *const g = row<T>(grad, sample, 0, first + p);
    T* const to = row<T>(grad_x, sample, 0, first + p);
    Vec<A> a[S], d[S];
    for (int s = 0; s < S; s++) {
      a[s] = splat<Vec<A>>(attention[s]);
      d[s] = splat<Vec<A>>(dz[s]);
    }
    constexpr size_t size = kLanes<T> * sizeof(T);
    const bool past_caches = far && reinterpret_cast<uintptr_t>(to) % size == 0 && grad_x.pixel * sizeof(T) % size == 0;
    for_lanes<T>(c, [=, this, &a, &d](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> mean = load(context + i, lanes), by_grad = load(scale + i, lanes);
      const Vec<A> by_attention = load(grad_context + i, lanes), by_dz = load(weight + i, lanes);
      Vec<A> sum{};
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        sum += (load(v + s * x.pixel + i, lanes) - mean) * d[s];
        const Vec<A> result = load(g + s * grad.pixel + i, lanes) * by_grad + by_attention * a[s] + by_dz * d[s];
        if constexpr (std::is_same_v<decltype(lanes), Full>) {
          if (past_caches) {
            store_past_caches(to + s * grad_x.pixel + i, result);
            continue;
          }
        }
        store(to + s * grad_x.pixel + i, result, lanes);
      }
      store(out + i, load(out + i, lanes) + sum, lanes);
    });
  }
};

// grad_x of a sample whose attention is not the mean, and its share in the gradient of the attention's weight and bias:
// `grad_weight` has c + 1 elements for each chunk. All is computed of x - context: it changes nothing, as dz sums to 0,
// but is exact where one pixel has all attention.
template <class T>
void context_gradient(const Team& team, const ContextPool<T, true>& pool, const Map& grad_x, int64_t i, bool far,
                      const Acc<T>* scale, const Acc<T>* grad_context, Acc<T>* grad_weight) {
  using A = Acc<T>;
  const auto s = pool.sample(i);
  const Map x = pool.x_, grad = pool.grad_;
  const int64_t c = pool.c_;
  const A *const weight = pool.weight_, *const context = s.sums;
  pool.chunks.each(team, 3 * c, [=](int64_t chunk, int64_t first, int64_t pixels) {
    const Scratch<A> scratch(2 * pixels);
    A *const attention = scratch.data(), *const dz = attention + pixels;
    A* const out = grad_weight + chunk * (c + 1);
    const A *const e = s.weights + first, factor = s.chunks[3 * chunk + 2];
    std::fill_n(out, c, A(0));
    Vec<A> total{};
    const bool planes = x.pixel == 1;
    // Rows while they are in the first cache.
    const int64_t step = planes ? pixels : kLanes<T>;
    for (int64_t begin = 0; begin < pixels; begin += step) {
      const int64_t count = std::min(step, pixels - begin);
      A *const a = attention + begin, *const d = dz + begin;
      weigh_channels<true>(row<T>(x, i, 0, first + begin), x, count, c, grad_context, context, A(0), d);
      for_lanes<A>(count, [&](int64_t p, auto lanes) {
        const Vec<A> weight = load(e + begin + p, lanes) * factor, slope = weight * load(d + p, lanes);
        store(a + p, weight, lanes);
        store(d + p, slope, lanes);
        total += load(d + p, lanes);
      });
      const ContextGradient<T> gradient{x,     grad,    grad_x,       i,     first + begin, c, far,
                                        scale, context, grad_context, weight};
      planes ? gradient.planes(count, a, d, out) : gradient.rows(count, a, d, out);
    }
    out[c] = sum_lanes(total);
    finish_stores();
  });
}

}  // namespace convblocks::cpu
