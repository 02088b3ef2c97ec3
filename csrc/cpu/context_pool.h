// The passes of global context over the maps of a sample. Pixels are taken in chunks: the logits of a chunk are made
// from all its channels, and while it is in the cache its pixels are summed by the exponentials of these. What the
// chunks leave (maximum, sum of exponentials, weighted sums of the channels) is put together afterwards, in order.
#pragma once
#include "channel_gate.h"
#include "lanes.h"
#include "weigh_channels.h"

namespace convblocks::cpu {

// How the pixels of a sample are cut: by the sizes only. A thread takes several chunks of planes together where the last
// cache holds them: what it then reads of a plane, or most of it, lies side by side.
template <class T>
struct Chunks {
  int64_t pixels, length, count, together;
  Chunks(int64_t c, int64_t hw, bool planes) : pixels(hw) {
    constexpr int64_t L = kLanes<T>;
    const int64_t bytes = c * sizeof(T);
    const int64_t most =
        planes ? std::clamp<int64_t>((384 << 10) / bytes, 64, 1024) : std::clamp<int64_t>((128 << 10) / bytes, 16, 256);
    const int64_t even = (hw + most - 1) / most;
    length = ((hw + even - 1) / even + L - 1) / L * L;
    count = (hw + length - 1) / length;
    together = planes ? std::max<int64_t>(1, (1536 << 10) / (length * bytes)) : 1;
  }
  int64_t first(int64_t chunk) const { return std::min(pixels, chunk * length); }
  int64_t size(int64_t chunk, int64_t chunks = 1) const { return first(chunk + chunks) - first(chunk); }

  // Calls f(chunk, chunks) for all chunks, several at a time, which a team divides.
  template <class F>
  void each(const Team& team, int64_t cost, F f) const {
    // Compiled once, whoever calls it: two copies could round differently.
    team.split(count, length * cost, [=, *this](int64_t first, int64_t last) __attribute__((noinline)) {
      for (int64_t chunk = first; chunk < last; chunk += together) f(chunk, std::min(together, last - chunk));
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
      : c_(c), hw_(hw), x_(x), grad_(grad), weight_(weight), bias_(bias), chunks(c, hw, x.pixel == 1),
        fetch_(kBackward == (x.pixel != 1) && exceeds_caches((kBackward ? 4 : 1) * n * c * hw * sizeof(T))),
        online_(online()) {
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
    chunks.each(team, (K + 1) * c_, [=, this](int64_t chunk, int64_t some) {
      const int64_t first = chunks.first(chunk), last = chunk + some;
      if (!weight_) {
        for (int64_t k = chunk; k < last; k++) {
          s.chunks[3 * k] = 0;
          s.chunks[3 * k + 1] = A(chunks.size(k));
        }
        sum<false>(i, chunk, last, s);
      } else if (online_) {
        for (int64_t k = chunk; k < last; k++) {
          const int64_t begin = chunks.first(k);
          const auto pool = x_.pixel == 1 ? &ContextPool::pool_planes : &ContextPool::pool_rows;
          (this->*pool)(i, begin, chunks.size(k), s.weights + begin, s.chunks + 3 * k, s.partial + k * K * c_);
        }
      } else {
        weigh_channels<false>(row<T>(x_, i, 0, first), x_, chunks.size(chunk, some), c_, weight_,
                              static_cast<const A*>(nullptr), bias_, s.weights + first);
        for (int64_t k = chunk; k < last; k++) {
          exponentials(s.weights + chunks.first(k), chunks.size(k), s.chunks + 3 * k);
        }
        sum<true>(i, chunk, last, s);
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

  // How many pixels are pooled at once, so that the first cache holds them, by the sizes of a sample only. 0 where a chunk
  // is read twice: planes of which short pieces would be left, and those of two maps.
  static constexpr int64_t kMostOnline = 256;
  int64_t online() const {
    constexpr int64_t L = kLanes<T>;
    const int64_t bytes = c_ * sizeof(T);
    if (x_.pixel != 1) return std::clamp<int64_t>((24 << 10) / bytes / L * L, L, kMostOnline);
    const int64_t most = std::min<int64_t>((32 << 10) / bytes, 128) / L * L;
    return kBackward || most * sizeof(T) < 256 ? 0 : most;
  }

  // 1 at the maximum, and nothing far below it.
  static Vec<A> exp_below(Vec<A> v) { return v < -87 ? Vec<A>{} : exp(v); }

  // What is taken off logits: where all are -Inf, their exponentials are 0.
  static A taken_off(A maximum) { return maximum == -std::numeric_limits<A>::infinity() ? A(0) : maximum; }

  // From logits to exp(logit - maximum); leaves the maximum and the sum.
  static void exponentials(A* z, int64_t pixels, A* numbers) {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    Vec<A> most = splat<Vec<A>>(lowest), total{};
    for_lanes<A>(pixels, [&](int64_t p, auto lanes) { most = max_or_nan(most, load(z + p, lanes, lowest)); });
    const A maximum = max_lanes(most);
    for_lanes<A>(pixels, [&](int64_t p, auto lanes) {
      const Vec<A> e = exp_below(load(z + p, lanes, lowest) - taken_off(maximum));
      store(z + p, e, lanes);
      total += e;
    });
    numbers[0] = maximum;
    numbers[1] = sum_lanes(total);
  }

  template <bool kWeighted>
  static Vecs<A, K> terms(Vec<A> v, Vec<A> g, Vec<A> weight) {
    const Vec<A> weighted = kWeighted ? v * weight : v;
    if constexpr (kBackward)
      return {weighted, g * v, g};
    else
      return {weighted};
  }

  template <bool kWeighted>
  void sum(int64_t i, int64_t chunk, int64_t last, const Sample& s) const {
    constexpr int64_t G = std::max(1, kLanes<T> / 2);  // planes that reduce_planes takes together where they are short
    const int64_t some = std::max<int64_t>(1, (256 / chunks.length + G - 1) / G * G);
    const int64_t step = x_.pixel == 1 && last - chunk > 1 ? some : c_;
    for (int64_t channel = 0; channel < c_; channel += step) {
      const int64_t stop = std::min(c_, channel + step);
      for (int64_t k = chunk; k < last; k++) sum_channels<kWeighted>(i, k, channel, stop, s);
    }
  }
  // Of a chunk the channels in [begin, end), which are all of them in channels_last.
  template <bool kWeighted>
  void sum_channels(int64_t i, int64_t chunk, int64_t begin, int64_t end, const Sample& s) const {
    const int64_t first = chunks.first(chunk), pixels = chunks.size(chunk);
    const T* const x = row<T>(x_, i, 0, first);
    const T* const g = kBackward ? row<T>(grad_, i, 0, first) : x;
    A* const out = s.partial + chunk * K * c_;
    if (x_.pixel == 1) {
      const A* const e = kWeighted ? s.weights + first : nullptr;
      reduce_planes<T, K>(begin, end, pixels, out, c_,
                          [=, this](int64_t channel, int64_t p, auto lanes) CONVBLOCKS_LOOP {
                            return terms<kWeighted>(load(x + channel * x_.channel + p, lanes),
                                                    kBackward ? load(g + channel * grad_.channel + p, lanes) : Vec<A>{},
                                                    kWeighted ? load(e + p, lanes) : Vec<A>{});
                          });
    } else if constexpr (!kWeighted) {
      const int64_t step = x_.pixel, grad_step = kBackward ? grad_.pixel : step;
      sum_rows_of<T, K>(0, pixels, c_, out, [=](int64_t p, int64_t channel, auto lanes) CONVBLOCKS_LOOP {
        return terms<false>(load(x + p * step + channel, lanes),
                            kBackward ? load(g + p * grad_step + channel, lanes) : Vec<A>{}, Vec<A>{});
      });
    }
  }

  // The logits of a few pixels and, while these are in the first cache, their sums, by exponentials of what the logits
  // lie below the maximum so far. A higher maximum makes the sums so far smaller: they are the first `size` numbers at
  // `out`. weigh(first, count, z) and add(first, count, weights) do it for some pixels.
  template <class Weigh, class Add>
  void pool_online(int64_t first, int64_t pixels, A* z, A* numbers, A* out, int64_t size, Weigh weigh, Add add) const {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    std::fill_n(out, K * size, A(0));
    A maximum = lowest, weights[kMostOnline];
    Vec<A> total{};
    for (int64_t p = 0; p < pixels; p += online_) {
      const int64_t count = std::min(online_, pixels - p);
      weigh(first + p, count, z + p);
      Vec<A> highest = splat<Vec<A>>(lowest);
      for_lanes<A>(count,
                   [&](int64_t j, auto lanes) { highest = max_or_nan(highest, load(z + p + j, lanes, lowest)); });
      const A most = max_lanes(highest);
      if (!(most <= maximum)) {
        const A rescale = p ? std::exp(maximum - most) : A(0);
        for_lanes<A>(p ? size : 0, [=](int64_t j, auto lanes)
                                       CONVBLOCKS_LOOP { store(out + j, load(out + j, lanes) * rescale, lanes); });
        total *= rescale;
        maximum = most;
      }
      for_lanes<A>(count, [&](int64_t j, auto lanes) {
        const Vec<A> e = exp_below(load(z + p + j, lanes, lowest) - taken_off(maximum));
        store(weights + j, e, lanes);
        total += e;
      });
      add(first + p, count, weights);
    }
    numbers[0] = maximum;
    numbers[1] = sum_lanes(total);
    if (!kBackward) return;
    for_lanes<A>(pixels, [=, top = taken_off(maximum)](int64_t p, auto lanes) {
      store(z + p, exp_below(load(z + p, lanes) - top), lanes);
    });
  }

  void pool_rows(int64_t i, int64_t first, int64_t pixels, A* z, A* numbers, A* out) const {
    constexpr int L = kLanes<T>;
    const int64_t last = first + pixels, step = x_.pixel, grad_step = kBackward ? grad_.pixel : 0;
    const T *const x = row<T>(x_, i, 0), *const g = kBackward ? row<T>(grad_, i, 0) : x;
    pool_online(
        first, pixels, z, numbers, out, c_,
        [=, this](int64_t p, int64_t count, A* logits) {
          if (fetch_) fetch_rows(g + p * grad_step, grad_step, count, c_);
          weigh_channels<false>(x + p * step, x_, count, c_, weight_, static_cast<const A*>(nullptr), bias_, logits);
          if (fetch_) fetch_rows(x + (p + count) * step, step, std::min(count, last - p - count), c_);
        },
        [=, this](int64_t p, int64_t count, const A* weights) {
          by_rows<L>(count, [=, this]<int S>(int64_t j, std::integral_constant<int, S>) CONVBLOCKS_LOOP {
            add_rows<S>(x + (p + j) * step, g + (p + j) * grad_step, weights + j, out);
          });
        });
  }

  // Not in the backward. A channel has a vector, whose lanes are added up at the end.
  void pool_planes(int64_t i, int64_t first, int64_t pixels, A* z, A* numbers, A* out) const {
    constexpr int L = kLanes<A>;
    const Scratch<A> scratch(c_ * L);
    A* const sums = scratch.data();
    const T* const x = row<T>(x_, i, 0);
    // Calls f(pixel, vectors, lanes) for some vectors of pixels.
    const auto by_vectors = [](int64_t count, auto f) CONVBLOCKS_LOOP {
      int64_t p = 0;
      for (; p + 4 * L <= count; p += 4 * L) f(p, std::integral_constant<int, 4>{}, Full{});
      for (; p + L <= count; p += L) f(p, std::integral_constant<int, 1>{}, Full{});
      if (p < count) f(p, std::integral_constant<int, 1>{}, static_cast<int>(count - p));
    };
    const int64_t last = first + pixels;
    pool_online(
        first, pixels, z, numbers, sums, c_ * L,
        [=, this](int64_t at, int64_t count, A* logits) {
          if (fetch_) fetch_rows(x + at + count, x_.channel, c_, std::min(count, last - at - count));
          by_vectors(count, [=, this, c = c_, step = x_.channel, w = weight_, bias = bias_]<int S>(
                                int64_t p, std::integral_constant<int, S>, auto lanes) CONVBLOCKS_LOOP {
            Vec<A> v[S];
            for (int s = 0; s < S; s++) v[s] = splat<Vec<A>>(bias);
            const T* from = x + at + p;
            for (int64_t k = 0; k < c; k++, from += step) {
#pragma GCC unroll 4
              for (int s = 0; s < S; s++) v[s] += load(from + s * L, lanes) * w[k];
            }
            for (int s = 0; s < S; s++) store(logits + p + s * L, v[s], lanes);
          });
        },
        [=, this](int64_t at, int64_t count, const A* weights) {
          by_vectors(count, [=, this, c = c_, step = x_.channel]<int S>(int64_t p, std::integral_constant<int, S>,
                                                                        auto lanes) CONVBLOCKS_LOOP {
            Vec<A> e[S];
            for (int s = 0; s < S; s++) e[s] = load(weights + p + s * L, lanes);
            const T* from = x + at + p;
            A* to = sums;
            for (int64_t k = 0; k < c; k++, from += step, to += L) {
              Vec<A> sum{};
#pragma GCC unroll 4
              for (int s = 0; s < S; s++) sum += load(from + s * L, lanes) * e[s];
              store(to, load(to) + sum);
            }
          });
        });
    for (int64_t channel = 0; channel < c_; channel += L) {
      const auto channels = static_cast<int>(std::min<int64_t>(L, c_ - channel));
      Vec<A> of_channels[L]{};
      for (int j = 0; j < channels; j++) of_channels[j] = load(sums + (channel + j) * L);
      store(out + channel, sum_each(of_channels), channels);
    }
  }

  template <int S>
  CONVBLOCKS_LOOP void add_rows(const T* x, const T* g, const A* weights, A* out) const {
    Vec<A> weight[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) weight[s] = splat<Vec<A>>(weights[s]);
    const int64_t c = c_, step = x_.pixel, grad_step = kBackward ? grad_.pixel : 0;
    for_lanes<T>(c, [=](int64_t channel, auto lanes) CONVBLOCKS_LOOP {
      Vecs<A, K> acc{};
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) {
        const Vecs<A, K> v = terms<true>(load(x + s * step + channel, lanes),
                                         kBackward ? load(g + s * grad_step + channel, lanes) : Vec<A>{}, weight[s]);
        for (int k = 0; k < K; k++) acc[k] += v[k];
      }
      for (int k = 0; k < K; k++) {
        A* const to = out + k * c + channel;
        store(to, load(to, lanes) + acc[k], lanes);
      }
    });
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

  const bool fetch_;  // maps so large that little of them is in the last cache, which others use, too
  const int64_t online_;
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

}  // namespace convblocks::cpu
