// The passes of global context's backward over the maps of a sample: the sums that the transforms' gradients are made of,
// and the gradient of x with what that of the attention's weight is made of.
#pragma once
#include "context_chunks.h"
#include "weigh_channels.h"

namespace convblocks::cpu {

// The sums over the pixels of grad * x, which the gate's gradient is made of, and of grad, for what is added.
template <class T>
class ContextSums {
 public:
  using A = Acc<T>;

  ContextSums(const Context& context, const Chunks<T>& chunks, int64_t n, int64_t c, const Map& x, const Map& grad,
              bool products, bool grads)
      : chunks_(chunks), c_(c), k_(products + grads), x_(x), grad_(grad), products_(products), grads_(grads) {
    sums_ = static_cast<A*>(context.workspace(context, n * (1 + chunks.count) * k_ * c * sizeof(A)));
    partial_ = sums_ + n * k_ * c;
  }

  void sum(int64_t i, int64_t chunk, int64_t some) const {
    const auto add = [&]<int K>(std::integral_constant<int, K>, auto terms) {
      chunks_.template sum<K>(chunk, chunk + some, c_, x_, grad_, i, partial(i), terms);
    };
    if (!grads_)
      add(std::integral_constant<int, 1>{}, [](Vec<A> v, Vec<A> g) CONVBLOCKS_LOOP { return Vecs<A, 1>{v * g}; });
    else if (!products_)
      add(std::integral_constant<int, 1>{}, [](Vec<A>, Vec<A> g) CONVBLOCKS_LOOP { return Vecs<A, 1>{g}; });
    else
      add(std::integral_constant<int, 2>{}, [](Vec<A> v, Vec<A> g) CONVBLOCKS_LOOP { return Vecs<A, 2>{v * g, g}; });
  }
  void merge(int64_t i) const {
    chunks_.merge(k_ * c_, partial(i), sums(i), [](int64_t) { return A(1); });
  }
  const A* products(int64_t i) const { return sums(i); }
  const A* grads(int64_t i) const { return sums(i) + (k_ - 1) * c_; }

 private:
  A* sums(int64_t i) const { return sums_ + i * k_ * c_; }
  A* partial(int64_t i) const { return partial_ + i * chunks_.count * k_ * c_; }

  const Chunks<T> chunks_;
  const int64_t c_, k_;
  const Map x_, grad_;
  const bool products_, grads_;
  A *sums_, *partial_;
};

// Of a sample: where it is, and what is made of the channels of `pixels` pixels from `first` on.
template <class T>
struct ContextGradient {
  using A = Acc<T>;
  Map x, grad, grad_x;
  int64_t sample, c;
  bool far, fetch;
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
    const int64_t x_step = x.pixel, grad_step = grad.pixel, to_step = grad_x.pixel;
    for_lanes<T>(c, [=, *this](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> mean = load(context + i, lanes), by_grad = load(scale + i, lanes);
      const Vec<A> by_attention = load(grad_context + i, lanes), by_dz = load(weight + i, lanes);
      Vec<A> sum{}, results[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        sum += (load(v + s * x_step + i, lanes) - mean) * d[s];
        results[s] = load(g + s * grad_step + i, lanes) * by_grad + by_attention * a[s] + by_dz * d[s];
      }
#pragma GCC unroll 4
      for (int s = 0; s < S; s++) {
        if constexpr (std::is_same_v<decltype(lanes), Full>) {
          if (past_caches) {
            store_past_caches(to + s * to_step + i, results[s]);
            continue;
          }
        }
        store(to + s * to_step + i, results[s], lanes);
      }
      store(out + i, load(out + i, lanes) + sum, lanes);
    });
  }
};

// grad_x of a sample whose attention is not the mean, and its share in the gradient of the attention's weight and bias:
// `grad_weight` has c + 1 elements for each chunk. All is computed of x - context: it changes nothing, as dz sums to 0,
// but is exact where one pixel has all attention.
template <class T>
void context_gradient(const Team& team, const Chunks<T>& chunks, const ContextGradient<T>& gradient,
                      const Acc<T>* attention, Acc<T>* grad_weight) {
  using A = Acc<T>;
  const int64_t c = gradient.c;
  const bool planes = gradient.x.pixel == 1;
  constexpr int L = kLanes<T>;
  const int64_t rows_bytes = L * c * sizeof(T);
  const bool fetch = gradient.fetch && rows_bytes <= 16 << 10;  // the next rows, where the first cache holds them, too
  const int64_t rows = rows_bytes <= 32 << 10 ? L : 4;
  // Of planes, little enough that the second cache holds it between its two reads, if that leaves long pieces.
  const bool few = planes && chunks.length * c * sizeof(T) <= 256 << 10;
  const int64_t most = few ? std::max<int64_t>(1, 1024 / chunks.length) : chunks.together;
  const auto some_chunks = [=, &gradient](int64_t chunk, int64_t some) {
    const int64_t start = chunks.first(chunk), all = chunks.size(chunk, some);
    const Scratch<A> scratch(all + some * L * L);
    A *const dz = scratch.data(), *const sums = dz + all;  // dz: of the pixels from start on
    const auto weigh = [&](int64_t first, int64_t pixels) {
      weigh_channels<true>(row<T>(gradient.x, gradient.sample, 0, first), gradient.x, pixels, c, gradient.grad_context,
                           gradient.context, A(0), dz + first - start);
    };
    if (planes) weigh(start, all);
    for (int64_t k = chunk; k < chunk + some; k++) {
      A* const out = grad_weight + k * (c + 1);
      const int64_t begin = chunks.first(k), end = begin + chunks.size(k);
      std::fill_n(out, c, A(0));
      Vec<A> total{};
      // Rows while they are in the first cache.
      for (int64_t first = begin; first < end;) {
        const int64_t pixels = std::min<int64_t>(planes ? end - begin : rows, end - first);
        if (!planes) weigh(first, pixels);
        for_lanes<A>(pixels, [&, d = dz + first - start](int64_t p, auto lanes) {
          const Vec<A> slope = load(attention + first + p, lanes) * load(d + p, lanes);
          store(d + p, slope, lanes);
          total += slope;
        });
        if (!planes) {
          const int64_t next = std::min<int64_t>(fetch ? L : 0, end - first - pixels);
          fetch_rows(row<T>(gradient.x, gradient.sample, 0, first + pixels), gradient.x.pixel, next, c);
          gradient.rows(first, pixels, attention + first, dz + first - start, out);
        }
        first += pixels;
      }
      out[c] = sum_lanes(total);
    }
    for (int64_t channel = 0; planes && channel < c; channel += L) {
      const int64_t channels = std::min<int64_t>(L, c - channel);
      for (int64_t j = 0; j < channels; j++) {
        for (int64_t k = 0; k < some; k++) {
          const int64_t first = chunks.first(chunk + k);
          store(sums + (k * L + j) * L,
                gradient.plane(channel + j, first, chunks.size(chunk + k), attention + first, dz + first - start));
        }
      }
      for (int64_t k = 0; k < some; k++) {
        Vec<A> of_channels[L]{};
        for (int64_t j = 0; j < channels; j++) of_channels[j] = load(sums + (k * L + j) * L);
        store(grad_weight + (chunk + k) * (c + 1) + channel, sum_each(of_channels), static_cast<int>(channels));
      }
    }
    finish_stores();
  };
  chunks.each(team, 3 * c, [=](int64_t chunk, int64_t some) {
    const int64_t last = chunk + some;
    for (; chunk < last; chunk += most) some_chunks(chunk, std::min(most, last - chunk));
  });
}

}  // namespace convblocks::cpu
