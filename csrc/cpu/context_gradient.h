// The last pass of global context's backward over the maps of a sample: the gradient of x, and what that of the
// attention's weight is made of.
#pragma once
#include "context_pool.h"

namespace convblocks::cpu {

// Of a sample: where it is, and what is made of the channels of `pixels` pixels from `first` on.
template <class T>
struct ContextGradient {
  using A = Acc<T>;
  Map x, grad, grad_x;
  int64_t sample, c;
  bool far;
  const A *scale, *context, *grad_context, *weight;

  // From attention and dz to grad_x of a channel; returns its share in the gradient of the attention's weight.
  Vec<A> plane(int64_t channel, int64_t first, int64_t pixels, const A* attention, const A* dz) const {
    const T *v = row<T>(x, sample, channel, first), *g = row<T>(grad, sample, channel, first);
    const A mean = context[channel], by_grad = scale[channel], by_attention = grad_context[channel];
    const A by_dz = weight[channel];
    Vec<A> sum{};
    write_row<T>(row<T>(grad_x, sample, channel, first), pixels, far, [=, &sum](int64_t p, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> d = load(dz + p, lanes);
      sum += (load(v + p, lanes) - mean) * d;
      return load(g + p, lanes) * by_grad + load(attention + p, lanes) * by_attention + d * by_dz;
    });
    return sum;
  }

  void rows(int64_t first, int64_t pixels, const A* attention, const A* dz, A* out) const {
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) some_rows<4>(first + p, attention + p, dz + p, out);
    for (; p < pixels; p++) some_rows<1>(first + p, attention + p, dz + p, out);
  }

 private:
  template <int S>
  void some_rows(int64_t p, const A* attention, const A* dz, A* out) const {
    const T *const v = row<T>(x, sample, 0, p), *const g = row<T>(grad, sample, 0, p);
    T* const to = row<T>(grad_x, sample, 0, p);
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
  const bool planes = x.pixel == 1;
  const ContextGradient<T> gradient{x, grad, grad_x, i, c, far, scale, context, grad_context, weight};
  pool.chunks.each(team, 3 * c, [=, &pool](int64_t chunk, int64_t some) {
    const int64_t start = pool.chunks.first(chunk), all = pool.chunks.size(chunk, some);
    constexpr int L = kLanes<T>;
    const Scratch<A> scratch(2 * all + some * L * L);
    A* const sums = scratch.data() + 2 * all;
    const auto each = [&](auto f) {  // f(chunk, its attention, its dz, its share)
      for (int64_t k = chunk; k < chunk + some; k++) {
        A* const a = scratch.data() + pool.chunks.first(k) - start;
        f(k, a, a + all, grad_weight + k * (c + 1));
      }
    };
    const auto weigh = [&](int64_t first, int64_t pixels, A* to) {
      weigh_channels<true>(row<T>(x, i, 0, first), x, pixels, c, grad_context, context, A(0), to);
    };
    if (planes) weigh(start, all, scratch.data() + all);
    each([&](int64_t k, A* attention, A* dz, A* out) {
      const int64_t first = pool.chunks.first(k), pixels = pool.chunks.size(k);
      const A *const e = s.weights + first, factor = s.chunks[3 * k + 2];
      std::fill_n(out, c, A(0));
      Vec<A> total{};
      // Rows while they are in the first cache.
      const int64_t step = planes ? pixels : kLanes<T>;
      for (int64_t begin = 0; begin < pixels; begin += step) {
        const int64_t count = std::min(step, pixels - begin);
        A *const a = attention + begin, *const d = dz + begin;
        if (!planes) weigh(first + begin, count, d);
        for_lanes<A>(count, [&](int64_t p, auto lanes) {
          const Vec<A> weight = load(e + begin + p, lanes) * factor, slope = weight * load(d + p, lanes);
          store(a + p, weight, lanes);
          store(d + p, slope, lanes);
          total += load(d + p, lanes);
        });
        if (!planes) gradient.rows(first + begin, count, a, d, out);
      }
      out[c] = sum_lanes(total);
    });
    for (int64_t channel = 0; planes && channel < c; channel += L) {
      const int64_t channels = std::min<int64_t>(L, c - channel);
      for (int64_t j = 0; j < channels; j++) {
        A* to = sums + j * L;
        for (int64_t p = 0; p < all; p += pool.chunks.length, to += L * L) {
          const int64_t pixels = std::min(pool.chunks.length, all - p);
          store(to, gradient.plane(channel + j, start + p, pixels, scratch.data() + p, scratch.data() + all + p));
        }
      }
      each([&](int64_t k, const A*, const A*, A* out) {
        Vec<A> of_channels[L]{};
        for (int64_t j = 0; j < channels; j++) of_channels[j] = load(sums + ((k - chunk) * L + j) * L);
        store(out + channel, sum_each(of_channels), static_cast<int>(channels));
      });
    }
    finish_stores();
  });
}

}  // namespace convblocks::cpu
