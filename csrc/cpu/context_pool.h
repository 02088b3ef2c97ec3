// The passes of global context over the maps of a sample. Pixels are taken in chunks: the logits of a chunk are made
// from all its channels, and while it is in the cache its pixels are summed by the exponentials of these. What the
// chunks leave (maximum, sum of exponentials, weighted sums of the channels) is put together afterwards, in order.
#pragma once
#include "channel_gate.h"
#include "lanes.h"

namespace convblocks::cpu {

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
  // As many pixels as a vector has lanes share each load of the weights, and their sums are added up together.
  int64_t p = 0;
  for (; p + L <= pixels; p += L) {
    Vec<A> sums[L]{};
    const T* from = x + p * map.pixel;
    for_lanes<T>(c, [&, from, weight, center](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> w = load(weight + i, lanes), mean = kCentered ? load(center + i, lanes) : Vec<A>{};
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) sums[l] += (load(from + l * map.pixel + i, lanes) - mean) * w;
    });
    transpose<A>(sums);
    for (int step = L / 2; step > 0; step /= 2) {
      for (int l = 0; l < step; l++) sums[l] += sums[l + step];
    }
    store(out + p, sums[0] + bias);
  }
  for (; p < pixels; p++) {
    Vec<A> sum{};
    const T* from = x + p * map.pixel;
    for_lanes<T>(c, [&, from, weight, center](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> v = load(from + i, lanes);
      sum += (kCentered ? v - load(center + i, lanes) : v) * load(weight + i, lanes);
    });
    out[p] = sum_lanes(sum) + bias;
  }
}

// How the pixels of a sample are cut: by the sizes only.
template <class T>
struct Chunks {
  int64_t pixels, length, count;
  Chunks(int64_t c, int64_t hw, bool planes) : pixels(hw) {
    constexpr int64_t L = kLanes<T>;
    const int64_t bytes = c * sizeof(T);
    const int64_t most =
        planes ? std::clamp<int64_t>((256 << 10) / bytes, 64, 2048) : std::clamp<int64_t>((128 << 10) / bytes, 16, 256);
    const int64_t even = (hw + most - 1) / most;
    length = ((hw + even - 1) / even + L - 1) / L * L;
    count = (hw + length - 1) / length;
  }
  // Calls f(chunk, first pixel, pixels) for all chunks, which a team divides.
  template <class F>
  void each(const Team& team, int64_t cost, F f) const {
    team.split(count, length * cost, [=, *this](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; chunk++) {
        f(chunk, chunk * length, std::min(length, pixels - chunk * length));
      }
    });
  }
};

// The context of a sample, and for the backward the sums of grad * x and of grad.
template <class T, bool kBackward>
class ContextPool {
 public:
  using A = Acc<T>;
  static constexpr int K = kBackward ? 3 : 1;

  // What is known of a sample after run(): K vectors of c, the context first.
  struct Sample {
    A* sums;
    A* weights;  // exp(logit - maximum of the chunk) of each pixel; null for the mean
    A* chunks;   // of each chunk: its maximum, its sum of weights, and after run() what makes weights attention
    A* partial;
  };

  ContextPool(const Context& context, int64_t n, int64_t c, int64_t hw, const Map& x, const Map& grad, const A* weight,
              A bias)
      : c_(c), hw_(hw), x_(x), grad_(grad), weight_(weight), bias_(bias), chunks(c, hw, x.pixel == 1) {
    memory_ = static_cast<A*>(context.workspace(context, n * size() * sizeof(A)));
  }

  Sample sample(int64_t i) const {
    A* at = memory_ + i * size();
    A* const chunk_numbers = at + K * c_;
    A* const weights = chunk_numbers + 3 * chunks.count;
    return {at, weight_ ? weights : nullptr, chunk_numbers, weights + (weight_ ? hw_ : 0)};
  }

  void run(int64_t i, const Team& team) const {
    const Sample s = sample(i);
    chunks.each(team, (K + 1) * c_, [=, this](int64_t chunk, int64_t first, int64_t pixels) {
      A* const numbers = s.chunks + 3 * chunk;
      if (weight_) {
        A* const z = s.weights + first;
        weigh_channels<false>(row<T>(x_, i, 0, first), x_, pixels, c_, weight_, static_cast<const A*>(nullptr), bias_,
                              z);
        exponentials(z, pixels, numbers);
        sum<true>(i, first, pixels, z, s.partial + chunk * K * c_);
      } else {
        numbers[0] = 0;
        numbers[1] = A(pixels);
        sum<false>(i, first, pixels, nullptr, s.partial + chunk * K * c_);
      }
    });
    merge(s);
  }

  const int64_t c_, hw_;
  const Map x_, grad_;
  const A* const weight_;
  const A bias_;
  const Chunks<T> chunks;

 private:
  int64_t size() const { return K * c_ + 3 * chunks.count + (weight_ ? hw_ : 0) + chunks.count * K * c_; }

  // From logits to exp(logit - maximum); leaves the maximum and the sum.
  static void exponentials(A* z, int64_t pixels, A* numbers) {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    Vec<A> most = splat<Vec<A>>(lowest), total{};
    for_lanes<A>(pixels, [&](int64_t p, auto lanes) { most = max_or_nan(most, load(z + p, lanes, lowest)); });
    const A maximum = max_lanes(most);
    for_lanes<A>(pixels, [&](int64_t p, auto lanes) {
      const Vec<A> below = load(z + p, lanes, lowest) - maximum;
      const Vec<A> e = below < -87 ? Vec<A>{} : exp(below);  // 1 at the maximum, and nothing far below it
      store(z + p, e, lanes);
      total += e;
    });
    numbers[0] = maximum;
    numbers[1] = sum_lanes(total);
  }

  template <bool kWeighted>
  void sum(int64_t i, int64_t first, int64_t pixels, const A* e, A* out) const {
    const auto terms = [](Vec<A> v, Vec<A> g, Vec<A> weight) {
      const Vec<A> weighted = kWeighted ? v * weight : v;
      if constexpr (kBackward)
        return Vecs<A, K>{weighted, g * v, g};
      else
        return Vecs<A, K>{weighted};
    };
    const T* const x = row<T>(x_, i, 0, first);
    const T* const g = kBackward ? row<T>(grad_, i, 0, first) : x;
    if (x_.pixel == 1) {
      for (int64_t channel = 0; channel < c_; channel++) {
        const T *v = x + channel * x_.channel, *gradient = kBackward ? g + channel * grad_.channel : v;
        const auto sums = reduce_plane<T, K>(pixels, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
          return terms(load(v + p, lanes), kBackward ? load(gradient + p, lanes) : Vec<A>{},
                       kWeighted ? load(e + p, lanes) : Vec<A>{});
        });
        for (int k = 0; k < K; k++) out[k * c_ + channel] = sums[k];
      }
    } else {
      const int64_t step = x_.pixel, grad_step = kBackward ? grad_.pixel : step;
      sum_rows_of<T, K>(0, pixels, c_, out, [=](int64_t p, int64_t channel, auto lanes) CONVBLOCKS_LOOP {
        return terms(load(x + p * step + channel, lanes),
                     kBackward ? load(g + p * grad_step + channel, lanes) : Vec<A>{},
                     kWeighted ? splat<Vec<A>>(e[p]) : Vec<A>{});
      });
    }
  }

  // The sums of the sample from those of its chunks.
  void merge(const Sample& s) const {
    A maximum = s.chunks[0], total = 0;
    for (int64_t chunk = 1; chunk < chunks.count; chunk++) {
      const A other = s.chunks[3 * chunk];
      maximum = other > maximum || other != other ? other : maximum;
    }
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
      A* numbers = s.chunks + 3 * chunk;
      numbers[2] = std::exp(numbers[0] - maximum);
      total += numbers[2] * numbers[1];
    }
    for (int64_t chunk = 0; chunk < chunks.count; chunk++) s.chunks[3 * chunk + 2] /= total;
    const auto add = [=, this]<bool kFactor>(int64_t first, int64_t count, std::bool_constant<kFactor>) {
      for_lanes<A>(count, [=, this](int64_t at, auto lanes) {
        Vec<A> total{};
        for (int64_t chunk = 0; chunk < chunks.count; chunk++) {
          const Vec<A> v = load(s.partial + chunk * K * c_ + first + at, lanes);
          total += kFactor ? v * s.chunks[3 * chunk + 2] : v;
        }
        store(s.sums + first + at, total, lanes);
      });
    };
    add(0, c_, std::true_type{});
    if (K > 1) add(c_, (K - 1) * c_, std::false_type{});
  }

  A* memory_;
};

// y = x * scale + shift of the channel.
template <class T>
void scale_and_shift(const Team& team, const Map& x, const Map& y, int64_t sample, int64_t c, int64_t hw, bool far,
                     const Acc<T>* scale, const Acc<T>* shift) {
  if (x.pixel == 1) {
    team.split(c, hw, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* from = row<T>(x, sample, i);
        const Acc<T> s = scale[i], t = shift[i];
        write_row<T>(row<T>(y, sample, i), hw, far,
                     [=](int64_t p, auto lanes) CONVBLOCKS_LOOP { return load(from + p, lanes) * s + t; });
      }
      finish_stores();
    });
  } else {
    team.split(hw, c, [=](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        const T* from = row<T>(x, sample, 0, p);
        write_row<T>(row<T>(y, sample, 0, p), c, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
          return load(from + i, lanes) * load(scale + i, lanes) + load(shift + i, lanes);
        });
      }
      finish_stores();
    });
  }
}

// grad_x of a sample whose attention is not the mean, and its share in the gradient of the attention's weight and bias:
// `grad_weight` has c + 1 elements for each chunk. All is computed of x - context, which changes nothing, as dz sums to 0,
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
    const T* const v = row<T>(x, i, 0, first);
    weigh_channels<true>(v, x, pixels, c, grad_context, context, A(0), dz);
    Vec<A> total{};
    for_lanes<A>(pixels, [&](int64_t p, auto lanes) {
      const Vec<A> a = load(e + p, lanes) * factor, d = a * load(dz + p, lanes);
      store(attention + p, a, lanes);
      store(dz + p, d, lanes);
      total += load(dz + p, lanes);
    });
    out[c] = sum_lanes(total);
    const T* const g = row<T>(grad, i, 0, first);
    if (x.pixel == 1) {
      for (int64_t channel = 0; channel < c; channel++) {
        const T *values = v + channel * x.channel, *gradient = g + channel * grad.channel;
        const A mean = context[channel];
        out[channel] = reduce_plane<T, 1>(pixels, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
          return Vecs<A, 1>{(load(values + p, lanes) - mean) * load(dz + p, lanes)};
        })[0];
        const A by_grad = scale[channel], by_attention = grad_context[channel], by_dz = weight[channel];
        write_row<T>(row<T>(grad_x, i, channel, first), pixels, far, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
          return load(gradient + p, lanes) * by_grad + load(attention + p, lanes) * by_attention +
                 load(dz + p, lanes) * by_dz;
        });
      }
    } else {
      sum_rows_of<T, 1>(0, pixels, c, out, [=](int64_t p, int64_t channel, auto lanes) CONVBLOCKS_LOOP {
        return Vecs<A, 1>{(load(v + p * x.pixel + channel, lanes) - load(context + channel, lanes)) * dz[p]};
      });
      for (int64_t p = 0; p < pixels; p++) {
        const T* const gradient = g + p * grad.pixel;
        const A a = attention[p], d = dz[p];
        write_row<T>(row<T>(grad_x, i, 0, first + p), c, far, [=](int64_t channel, auto lanes) CONVBLOCKS_LOOP {
          return load(gradient + channel, lanes) * load(scale + channel, lanes) +
                 load(grad_context + channel, lanes) * a + load(weight + channel, lanes) * d;
        });
      }
    }
    finish_stores();
  });
}

}  // namespace convblocks::cpu
