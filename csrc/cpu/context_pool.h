// Global context's pooling of the pixels of a sample. They are taken in chunks: the logits of a chunk are made from all
// its channels, and while it is in the cache its pixels are summed by the exponentials of these. What the chunks leave
// (maximum, sum of exponentials, weighted sums of the channels) is put together afterwards, in order.
#pragma once
#include "context_chunks.h"
#include "weigh_channels.h"

namespace convblocks::cpu {

template <class T>
class ContextPool {
 public:
  using A = Acc<T>;

  struct Sample {
    A* context;    // (c)
    A* attention;  // (hw) after merge(), if it is asked for; before, of each chunk exp(logit - its maximum)
    A* chunks;     // of each: its maximum, its sum of exponentials, and what makes of these attention
    A* partial;    // of each: the sums of its pixels, (c)
  };

  // `memory`: see GlobalContextArgs; may be null. `whole`: attention is asked for.
  ContextPool(const Context& context, int64_t n, int64_t c, int64_t hw, const Map& x, const A* weight, A bias,
              A* memory, bool whole)
      : chunks(c, hw, x.pixel == 1), c_(c), hw_(hw), x_(x), weight_(weight), bias_(bias), whole_(whole && weight),
        fetch_(leaves_second_caches(2 * n * c * hw * sizeof(T), context.threads)), online_(online()) {
    const auto take = [&](int64_t size) { return static_cast<A*>(context.workspace(context, size * sizeof(A))); };
    contexts = memory ? memory : take(n * (c + (weight ? hw : 0)));
    attention_ = contexts + n * c;
    work_ = take(n * work_size());
  }

  Sample sample(int64_t i) const {
    A* const work = work_ + i * work_size();
    return {contexts + i * c_, weight_ ? attention_ + i * hw_ : nullptr, work, work + 3 * chunks.count};
  }

  void run(int64_t i, const Team& team) const {
    chunks.each(team, 2 * c_, [=, this](int64_t chunk, int64_t some) { pool(i, chunk, some); });
    merge(i);
  }

  // Some chunks together.
  void pool(int64_t i, int64_t chunk, int64_t some) const {
    const Sample s = sample(i);
    const int64_t last = chunk + some;
    if (!weight_) {
      for (int64_t k = chunk; k < last; k++) {
        s.chunks[3 * k] = 0;
        s.chunks[3 * k + 1] = A(chunks.size(k));
      }
      chunks.template sum<1>(chunk, last, c_, x_, x_, i, s.partial,
                             [](Vec<A> v, Vec<A>) CONVBLOCKS_LOOP { return Vecs<A, 1>{v}; });
    } else if (online_) {
      const auto pool = x_.pixel == 1 ? &ContextPool::pool_planes : &ContextPool::pool_rows;
      for (int64_t k = chunk; k < last; k++) {
        const int64_t begin = chunks.first(k);
        (this->*pool)(i, begin, chunks.size(k), s.attention + begin, s.chunks + 3 * k, s.partial + k * c_);
      }
    } else {
      pool_long_planes(i, chunk, last, s);
    }
  }

  // The sample from its chunks.
  void merge(int64_t i) const {
    const Sample s = sample(i);
    A maximum = s.chunks[0], total = 0;
    for (int64_t k = 1; k < chunks.count; k++) {
      const A other = s.chunks[3 * k];
      maximum = other > maximum || other != other ? other : maximum;
    }
    for (int64_t k = 0; k < chunks.count; k++) {
      A* const numbers = s.chunks + 3 * k;
      numbers[2] = std::exp(numbers[0] - maximum);
      total += numbers[2] * numbers[1];
    }
    for (int64_t k = 0; k < chunks.count; k++) s.chunks[3 * k + 2] /= total;
    chunks.merge(c_, s.partial, s.context, [numbers = s.chunks](int64_t k) { return numbers[3 * k + 2]; });
    for (int64_t k = 0; whole_ && k < chunks.count; k++) {
      for_lanes<A>(chunks.size(k),
                   [z = s.attention + chunks.first(k), factor = s.chunks[3 * k + 2]](int64_t p, auto lanes)
                       CONVBLOCKS_LOOP { store(z + p, load(z + p, lanes) * factor, lanes); });
    }
  }

  const Chunks<T> chunks;
  A* contexts;  // (n, c)

 private:
  int64_t work_size() const { return (3 + c_) * chunks.count; }

  // How many pixels are pooled at once, so that the first cache holds them, by the sizes of a sample only. 0 where a chunk
  // is read twice: planes of which short pieces would be left.
  static constexpr int64_t kMostOnline = 256;
  int64_t online() const {
    constexpr int64_t L = kLanes<T>;
    const int64_t bytes = c_ * sizeof(T);
    if (x_.pixel != 1) return std::clamp<int64_t>((24 << 10) / bytes / L * L, L, kMostOnline);
    const int64_t most = std::min<int64_t>((32 << 10) / bytes, 128) / L * L;
    return most * sizeof(T) < 256 ? 0 : most;
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

  void pool_long_planes(int64_t i, int64_t chunk, int64_t last, const Sample& s) const {
    const int64_t first = chunks.first(chunk);
    weigh_channels<false>(row<T>(x_, i, 0, first), x_, chunks.size(chunk, last - chunk), c_, weight_,
                          static_cast<const A*>(nullptr), bias_, s.attention + first);
    for (int64_t k = chunk; k < last; k++) {
      exponentials(s.attention + chunks.first(k), chunks.size(k), s.chunks + 3 * k);
    }
    chunks.each_plane(chunk, last, c_, [=, this](int64_t k, int64_t begin, int64_t end) {
      const A* const e = s.attention + chunks.first(k);
      const T* const x = row<T>(x_, i, 0, chunks.first(k));
      reduce_planes<T, 1>(begin, end, chunks.size(k), s.partial + k * c_, c_,
                          [=, step = x_.channel](int64_t channel, int64_t p, auto lanes) CONVBLOCKS_LOOP {
                            return Vecs<A, 1>{load(x + channel * step + p, lanes) * load(e + p, lanes)};
                          });
    });
  }

  // The logits of a few pixels and, while these are in the first cache, their sums, by exponentials of what the logits
  // lie below the maximum so far. A higher maximum makes the sums so far smaller: they are the first `size` numbers at
  // `out`. weigh(first, count, z) and add(first, count, weights) do it for some pixels.
  template <class Weigh, class Add>
  void pool_online(int64_t first, int64_t pixels, A* z, A* numbers, A* out, int64_t size, Weigh weigh, Add add) const {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    std::fill_n(out, size, A(0));
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
    if (!whole_) return;
    for_lanes<A>(pixels, [=, top = taken_off(maximum)](int64_t p, auto lanes) {
      store(z + p, exp_below(load(z + p, lanes) - top), lanes);
    });
  }

  void pool_rows(int64_t i, int64_t first, int64_t pixels, A* z, A* numbers, A* out) const {
    constexpr int L = kLanes<T>;
    const int64_t step = x_.pixel, last = first + pixels;
    const T* const x = row<T>(x_, i, 0);
    pool_online(
        first, pixels, z, numbers, out, c_,
        [=, this](int64_t p, int64_t count, A* logits) {
          weigh_channels<false>(x + p * step, x_, count, c_, weight_, static_cast<const A*>(nullptr), bias_, logits);
        },
        [=, this](int64_t p, int64_t count, const A* weights) {
          by_rows<L>(count, [=, this]<int S>(int64_t j, std::integral_constant<int, S>) CONVBLOCKS_LOOP {
            if (fetch_ && p + count + j + S <= last)
              fetch_rows(x + (p + count + j) * step, step, S, c_);  // those pooled next
            add_rows<S>(x + (p + j) * step, weights + j, out);
          });
        });
  }

  // A channel has a vector, whose lanes are added up at the end.
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
  CONVBLOCKS_LOOP void add_rows(const T* x, const A* weights, A* out) const {
    Vec<A> weight[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; s++) weight[s] = splat<Vec<A>>(weights[s]);
    for_lanes<T>(c_, [=, step = x_.pixel](int64_t channel, auto lanes) CONVBLOCKS_LOOP {
      constexpr int kSums = std::min(S, 4);
      Vec<A> sums[kSums]{};
#pragma GCC unroll 16
      for (int s = 0; s < S; s++) sums[s % kSums] += load(x + s * step + channel, lanes) * weight[s];
      for (int s = 1; s < kSums; s++) sums[0] += sums[s];
      store(out + channel, load(out + channel, lanes) + sums[0], lanes);
    });
  }

  const int64_t c_, hw_;
  const Map x_;
  const A* const weight_;
  const A bias_;
  const bool whole_;
  const bool fetch_;
  const int64_t online_;
  A *attention_, *work_;
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
