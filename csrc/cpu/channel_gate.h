// y = x * gate(squeeze(x)), a gate per channel, and its gradient: the passes over the maps that squeeze-excite and ECA
// share. What turns the squeezed means into gates is theirs. A sample is squeezed and scaled while it is in the cache.
#pragma once
#include <limits>

#include "reduce.h"

namespace convblocks::cpu {

// The sums over the pixels of each channel of x, and with `grad` those of grad * x, into out (2 * c or c elements).
template <class T, bool kDot>
void channel_sums(const Team& team, const Map& x, const Map& grad, int64_t sample, int64_t c, int64_t hw,
                  Acc<T>* partial, Acc<T>* out) {
  using A = Acc<T>;
  constexpr int K = kDot ? 2 : 1;
  const auto both = [](Vec<A> v, Vec<A> g) {
    if constexpr (kDot)
      return Vecs<A, K>{v, g * v};
    else
      return Vecs<A, K>{v};
  };
  const T *values = row<T>(x, sample, 0), *grads = kDot ? row<T>(grad, sample, 0) : values;
  if (x.pixel == 1) {
    team.split(c, K * hw, [=](int64_t begin, int64_t end) {
      reduce_planes<T, K>(begin, end, hw, out, c, [=](int64_t i, int64_t p, auto lanes) CONVBLOCKS_LOOP {
        return both(load(values + i * x.channel + p, lanes),
                    kDot ? load(grads + i * grad.channel + p, lanes) : Vec<A>{});
      });
    });
  } else {
    const int64_t stride = kDot ? grad.pixel : x.pixel;
    reduce_rows<T, K>(team, hw, c, partial, out, [=](int64_t p, int64_t i, auto lanes) CONVBLOCKS_LOOP {
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
    team.split(c, 2 * hw, [=](int64_t begin, int64_t end) {
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
    team.split((c + kLanes<T> - 1) / kLanes<T>, kLanes<T> * hw, [=](int64_t begin, int64_t end) {
      const int64_t first = begin * kLanes<T>, last = std::min(c, end * kLanes<T>);
      for_lanes<T>(last - first, [=](int64_t offset, auto lanes) CONVBLOCKS_LOOP {
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
  for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<A> mean = load(pooled + i, lanes) / A(hw);
    store(pooled + i, max ? A(0.5) * mean + A(0.5) * load(max + i, lanes) : mean, lanes);
  });
}

// How many samples are squeezed before the first of them is scaled: those that the cache holds. They share the loads of
// the gate's weights; more of them do where there are about as many weights as elements. How they are grouped depends on
// the threads, so doubles, which are rounded otherwise in groups than singly, are not.
template <class T>
inline constexpr int64_t kMostInGroup = sizeof(T) == 8 ? 1 : 8;
template <class T>
int64_t group_size(int64_t elements, int64_t weights = 0) {
  const int64_t bytes = std::max<int64_t>(1, elements * sizeof(T));
  return std::clamp<int64_t>(std::max<int64_t>(1 << 20, 8 * weights * sizeof(Acc<T>)) / bytes, 1, kMostInGroup<T>);
}

// gate(sample, count, pooled, gates, stride) computes the c gates of `count` samples, whose vectors lie `stride` apart.
template <class T, class F>
void channel_gate(const Context& context, int64_t n, int64_t c, int64_t hw, const Map& x, const Map& y,
                  bool add_maxpool, F gate) {
  using A = Acc<T>;
  const int64_t size = 4 * c + (x.pixel == 1 ? 0 : row_sums_size<1>(hw, c));
  A* workspace = static_cast<A*>(context.workspace(context, n * size * sizeof(A)));
  const bool far = exceeds_caches(n * c * hw * sizeof(T));
  const auto squeeze = [=](int64_t sample, const Team& team) {
    A *pooled = workspace + sample * size, *max = pooled + 2 * c, *ties = max + c, *partial = ties + c;
    channel_sums<T, false>(team, x, x, sample, c, hw, partial, pooled);
    if (add_maxpool) channel_max<T>(team, x, sample, c, hw, max, ties);
    finish_squeeze(pooled, add_maxpool ? max : nullptr, c, hw);
  };
  const auto scale = [=](int64_t sample, const Team& team) {
    const A* gates = workspace + sample * size + c;
    if (x.pixel == 1) {
      team.split(c, hw, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const T* from = row<T>(x, sample, i);
          const A gate = gates[i];
          write_row<T>(row<T>(y, sample, i), hw, far,
                       [=](int64_t p, auto lanes) CONVBLOCKS_LOOP { return load(from + p, lanes) * gate; });
        }
        finish_stores();
      });
    } else {
      team.split(hw, c, [=](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p++) {
          const T* from = row<T>(x, sample, 0, p);
          write_row<T>(row<T>(y, sample, 0, p), c, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
            return load(from + i, lanes) * load(gates + i, lanes);
          });
        }
        finish_stores();
      });
    }
  };
  for_each_group(context, n, group_size<T>(c * hw), c * hw, [&](int64_t first, int64_t count, const Team& team) {
    for (int64_t i = first; i < first + count; i++) squeeze(i, team);
    A* pooled = workspace + first * size;
    gate(first, count, pooled, pooled + c, size);
    for (int64_t i = first; i < first + count; i++) scale(i, team);
  });
}

// gate_backward(sample, count, pooled, grad_gates, gates, grad_pooled, stride) computes the gates again, and from their
// gradients that of the squeeze.
template <class T, class F>
void channel_gate_backward(const Context& context, int64_t n, int64_t c, int64_t hw, const Map& grad, const Map& x,
                           const Map& grad_x, bool add_maxpool, F gate_backward) {
  using A = Acc<T>;
  const int64_t size = 6 * c + (x.pixel == 1 ? 0 : row_sums_size<2>(hw, c));
  A* workspace = static_cast<A*>(context.workspace(context, n * size * sizeof(A)));
  const bool far = exceeds_caches(n * c * hw * sizeof(T));
  const auto squeeze = [=](int64_t sample, const Team& team) {
    A *pooled = workspace + sample * size, *max = pooled + 4 * c, *ties = max + c, *partial = ties + c;
    channel_sums<T, true>(team, x, grad, sample, c, hw, partial, pooled);
    if (add_maxpool) channel_max<T>(team, x, sample, c, hw, max, ties);
    finish_squeeze(pooled, add_maxpool ? max : nullptr, c, hw);
  };
  const auto finish = [=](int64_t sample, const Team& team) {
    A *gates = workspace + sample * size + 2 * c, *grad_pooled = gates + c, *max = grad_pooled + c, *ties = max + c;
    // What every pixel gets of the squeeze's gradient, and what those with the maximum get besides (into ties).
    const A mean_part = (add_maxpool ? A(0.5) : A(1)) / A(hw);
    for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> d = load(grad_pooled + i, lanes);
      if (add_maxpool) store(ties + i, A(0.5) * d / load(ties + i, lanes), lanes);
      store(grad_pooled + i, d * mean_part, lanes);
    });
    const auto apply = [&]<bool kMax>(std::bool_constant<kMax>) {
      if (x.pixel == 1) {
        team.split(c, 2 * hw, [=](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) {
            const T *g = row<T>(grad, sample, i), *v = row<T>(x, sample, i);
            const A gate = gates[i], shift = grad_pooled[i], top = max[i], top_shift = ties[i];
            write_row<T>(row<T>(grad_x, sample, i), hw, far, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
              Vec<A> d = load(g + p, lanes) * gate + shift;
              if constexpr (kMax) d += load(v + p, lanes) == top ? splat<Vec<A>>(top_shift) : Vec<A>{};
              return d;
            });
          }
          finish_stores();
        });
      } else {
        team.split(hw, 2 * c, [=](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; p++) {
            const T *g = row<T>(grad, sample, 0, p), *v = row<T>(x, sample, 0, p);
            write_row<T>(row<T>(grad_x, sample, 0, p), c, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
              Vec<A> d = load(g + i, lanes) * load(gates + i, lanes) + load(grad_pooled + i, lanes);
              if constexpr (kMax) d += load(v + i, lanes) == load(max + i, lanes) ? load(ties + i, lanes) : Vec<A>{};
              return d;
            });
          }
          finish_stores();
        });
      }
    };
    add_maxpool ? apply(std::true_type{}) : apply(std::false_type{});
  };
  const int64_t group = group_size<T>(2 * c * hw);
  for_each_group(context, n, group, 2 * c * hw, [&](int64_t first, int64_t count, const Team& team) {
    for (int64_t i = first; i < first + count; i++) squeeze(i, team);
    A* pooled = workspace + first * size;
    gate_backward(first, count, pooled, pooled + c, pooled + 2 * c, pooled + 3 * c, size);
    for (int64_t i = first; i < first + count; i++) finish(i, team);
  });
}

}  // namespace convblocks::cpu
