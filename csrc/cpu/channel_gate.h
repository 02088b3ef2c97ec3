// y = x * gate(squeeze(x)), a gate per channel, and its gradient: the passes over the maps that squeeze-excite and ECA
// share. What turns the squeezed means into gates is theirs. A sample is squeezed and scaled while it is in the cache.
#pragma once
#include <limits>

#include "reduce.h"

namespace convblocks::cpu {

template <class T>
T* row(const Map& map, int64_t sample, int64_t channel, int64_t pixel = 0) {
  return static_cast<T*>(map.data) + sample * map.batch + channel * map.channel + pixel * map.pixel;
}

// The sums over the pixels of each channel of x, and with `grad` those of grad * x, into out (2 * c or c elements).
template <class T, bool kDot>
void channel_sums(const Team& team, const Map& x, const Map& grad, int64_t sample, int64_t c, int64_t hw,
                  Acc<T>* partial, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int K = kDot ? 2 : 1;
  const auto both = [](Vec<A> v, Vec<A> g) {
    if constexpr (kDot) return Vecs<A, K>{v, g * v};
    else return Vecs<A, K>{v};
  };
  const T *values = row<T>(x, sample, 0), *grads = kDot ? row<T>(grad, sample, 0) : values;
  if (x.pixel == 1) {
    team.split(c, K * hw, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T *v = values + i * x.channel, *g = kDot ? grads + i * grad.channel : v;
        const auto sums = reduce_plane<T, K>(hw, [&](int64_t p, auto lanes) {
          return both(load(v + p, lanes), load(g + p, lanes));
        });
        for (int k = 0; k < K; k++) out[k * c + i] = sums[k];
      }
    });
  } else {
    const int64_t stride = kDot ? grad.pixel : x.pixel;
    reduce_rows<T, K>(team, hw, c, partial, out, [&](int64_t p, int64_t i, auto lanes) {
      return both(load(values + p * x.pixel + i, lanes), load(grads + p * stride + i, lanes));
    });
  }
}

// The maximum over the pixels of each channel, and how many pixels have it.
template <class T>
void channel_max(const Team& team, const Map& x, int64_t sample, int64_t c, int64_t hw, Acc<T>* max, Acc<T>* ties) {
  using A = Acc<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  if (x.pixel == 1) {
    team.split(c, 2 * hw, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const T* plane = row<T>(x, sample, i);
        Vec<A> m = splat<Vec<A>>(lowest), count{};
        for_lanes<T>(hw, [&](int64_t p, auto lanes) { m = max_or_nan(m, load(plane + p, lanes, lowest)); });
        max[i] = max_lanes(m);
        for_lanes<T>(hw, [&](int64_t p, auto lanes) {
          // The lanes that are not there hold NaN, which equals nothing.
          count += load(plane + p, lanes, std::numeric_limits<A>::quiet_NaN()) == max[i] ? splat<Vec<A>>(1) : Vec<A>{};
        });
        ties[i] = sum_lanes(count);
      }
    });
  } else {
    team.split((c + kLanes<T> - 1) / kLanes<T>, kLanes<T> * hw, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kLanes<T>, last = std::min(c, end * kLanes<T>);
      for_lanes<T>(last - first, [&](int64_t offset, auto lanes) {
        const int64_t i = first + offset;
        Vec<A> m = splat<Vec<A>>(lowest), count{};
        for (int64_t p = 0; p < hw; p++) m = max_or_nan(m, load(row<T>(x, sample, i, p), lanes));
        for (int64_t p = 0; p < hw; p++) {
          count += load(row<T>(x, sample, i, p), lanes) == m ? splat<Vec<A>>(1) : Vec<A>{};
        }
        store(max + i, m, lanes);
        store(ties + i, count, lanes);
      });
    });
  }
}

// pooled = mean, or (mean + max) / 2; `pooled` holds the sums.
template <class A>
void finish_squeeze(A* pooled, const A* max, int64_t c, int64_t hw) {
  for_lanes<A>(c, [&](int64_t i, auto lanes) {
    const Vec<A> mean = load(pooled + i, lanes) / A(hw);
    store(pooled + i, max ? A(0.5) * mean + A(0.5) * load(max + i, lanes) : mean, lanes);
  });
}

// gate(sample, pooled, gates) computes the c gates of a sample.
template <class T, class F>
void channel_gate(const Context& context, int64_t n, int64_t c, int64_t hw, const Map& x, const Map& y,
                  bool add_maxpool, F gate) {
  using A = Acc<T>;
  const int64_t size = 4 * c + (x.pixel == 1 ? 0 : row_sums_size<1>(hw, c));
  A* workspace = static_cast<A*>(context.workspace(context, n * size * sizeof(A)));
  for_each_sample(context, n, c * hw, [&](int64_t sample, const Team& team) {
    A *pooled = workspace + sample * size, *gates = pooled + c, *max = gates + c, *ties = max + c, *partial = ties + c;
    channel_sums<T, false>(team, x, x, sample, c, hw, partial, pooled);
    if (add_maxpool) channel_max<T>(team, x, sample, c, hw, max, ties);
    finish_squeeze(pooled, add_maxpool ? max : nullptr, c, hw);
    gate(sample, pooled, gates);
    if (x.pixel == 1) {
      team.split(c, hw, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const T* from = row<T>(x, sample, i);
          T* to = row<T>(y, sample, i);
          for_lanes<T>(hw, [&](int64_t p, auto lanes) { store(to + p, load(from + p, lanes) * gates[i], lanes); });
        }
      });
    } else {
      team.split(hw, c, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
          const T* from = row<T>(x, sample, 0, p);
          T* to = row<T>(y, sample, 0, p);
          for_lanes<T>(c, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes) * load(gates + i, lanes), lanes); });
        }
      });
    }
  });
}

// gate_backward(sample, pooled, grad_gates, gates, grad_pooled) computes the gates again, and from their gradients that
// of the squeeze.
template <class T, class F>
void channel_gate_backward(const Context& context, int64_t n, int64_t c, int64_t hw, const Map& grad, const Map& x,
                           const Map& grad_x, bool add_maxpool, F gate_backward) {
  using A = Acc<T>;
  const int64_t size = 6 * c + (x.pixel == 1 ? 0 : row_sums_size<2>(hw, c));
  A* workspace = static_cast<A*>(context.workspace(context, n * size * sizeof(A)));
  for_each_sample(context, n, 2 * c * hw, [&](int64_t sample, const Team& team) {
    A *pooled = workspace + sample * size, *grad_gates = pooled + c, *gates = grad_gates + c, *grad_pooled = gates + c,
      *max = grad_pooled + c, *ties = max + c, *partial = ties + c;
    channel_sums<T, true>(team, x, grad, sample, c, hw, partial, pooled);
    if (add_maxpool) channel_max<T>(team, x, sample, c, hw, max, ties);
    finish_squeeze(pooled, add_maxpool ? max : nullptr, c, hw);
    gate_backward(sample, pooled, grad_gates, gates, grad_pooled);
    // What every pixel gets of the squeeze's gradient, and what those with the maximum get besides (into ties).
    const A mean_part = (add_maxpool ? A(0.5) : A(1)) / A(hw);
    for_lanes<A>(c, [&](int64_t i, auto lanes) {
      const Vec<A> d = load(grad_pooled + i, lanes);
      if (add_maxpool) store(ties + i, A(0.5) * d / load(ties + i, lanes), lanes);
      store(grad_pooled + i, d * mean_part, lanes);
    });
    const auto apply = [&]<bool kMax>(std::bool_constant<kMax>) {
      if (x.pixel == 1) {
        team.split(c, 2 * hw, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) {
            const T *g = row<T>(grad, sample, i), *v = row<T>(x, sample, i);
            T* to = row<T>(grad_x, sample, i);
            for_lanes<T>(hw, [&](int64_t p, auto lanes) {
              Vec<A> d = load(g + p, lanes) * gates[i] + grad_pooled[i];
              if constexpr (kMax) d += load(v + p, lanes) == max[i] ? splat<Vec<A>>(ties[i]) : Vec<A>{};
              store(to + p, d, lanes);
            });
          }
        });
      } else {
        team.split(hw, 2 * c, [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; p++) {
            const T *g = row<T>(grad, sample, 0, p), *v = row<T>(x, sample, 0, p);
            T* to = row<T>(grad_x, sample, 0, p);
            for_lanes<T>(c, [&](int64_t i, auto lanes) {
              Vec<A> d = load(g + i, lanes) * load(gates + i, lanes) + load(grad_pooled + i, lanes);
              if constexpr (kMax) d += load(v + i, lanes) == load(max + i, lanes) ? load(ties + i, lanes) : Vec<A>{};
              store(to + i, d, lanes);
            });
          }
        });
      }
    };
    add_maxpool ? apply(std::true_type{}) : apply(std::false_type{});
  });
}

}  // namespace convblocks::cpu
