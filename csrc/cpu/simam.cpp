// SimAM on the CPU. A plane (NCHW) or a block of channels (channels_last) is read three times, from memory only once while
// it fits in the cache: mean, variance, result. The backward keeps the gate's part of the result in between.
#include "../simam.h"

#include "dispatch.h"
#include "reduce.h"

namespace convblocks::cpu {
namespace {

template <class T>
T* plane_of(const Map& map, int64_t sample, int64_t channel) {
  return static_cast<T*>(map.data) + sample * map.batch + channel * map.channel;
}

// The gate, sigmoid(d^2 / q + 1/2), and 1 - gate; `rate` is log2(e) / q.
constexpr double kLog2E = 1.4426950408889634;
template <class V>
struct GateOf {
  V gate, rest;
  GateOf(V d, auto rate) {
    const V power = exp2_of_negative(-(d * d * rate) - Lane<V>(kLog2E / 2));
    gate = reciprocal(1 + power);
    rest = power * gate;
  }
};

// Where the backward keeps the gate's part of its result: in the result, or in memory of its own if that cannot hold it
// or is to be written past the caches.
template <class T>
struct Kept {
  using A = Acc<T>;
  Scratch<A> scratch;
  A* data;
  int64_t stride;
  Kept(T* result, int64_t result_stride, int64_t size, bool far, int64_t own_stride = 0)
      : scratch(far || !std::is_same_v<T, A> ? size : 0), data(scratch.data()), stride(own_stride) {
    if constexpr (std::is_same_v<T, A>) {
      if (!far) data = result, stride = result_stride;
    }
  }
};

// --- NCHW -------------------------------------------------------------------------------------------------------------

template <class T>
struct PlaneStats {
  Acc<T> mean, q;  // q = 4 (v + lambda)
  PlaneStats(const T* x, int64_t hw, double e_lambda) {
    using A = Acc<T>;
    const auto value = [=](int64_t i, auto lanes) CONVBLOCKS_LOOP { return Vecs<A, 1>{load(x + i, lanes)}; };
    const A m = reduce_plane<T, 1>(hw, value)[0] / A(hw);
    const auto square = [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> d = load(x + i, lanes, m) - m;
      return Vecs<A, 1>{d * d};
    };
    const A spread = reduce_plane<T, 1>(hw, square)[0];
    mean = m;
    q = 4 * (spread / A(hw - 1) + A(e_lambda));
  }
};

template <class T>
void forward_plane(const T* x, T* y, int64_t hw, double e_lambda, bool far) {
  const PlaneStats<T> s(x, hw, e_lambda);
  const Acc<T> rate = Acc<T>(kLog2E) / s.q, mean = s.mean;
  write_row<T>(y, hw, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<Acc<T>> v = load(x + i, lanes);
    return v * GateOf(v - mean, rate).gate;
  });
}

template <class T>
void backward_plane(const T* grad, const T* x, T* grad_x, int64_t hw, double e_lambda, bool far) {
  using A = Acc<T>;
  const Kept<T> kept_part(grad_x, hw, hw, far);
  A* kept = kept_part.data;
  const PlaneStats<T> s(x, hw, e_lambda);
  const A scale = 1 / s.q, rate = A(kLog2E) / s.q, mean = s.mean;
  const auto [s1, s2] = reduce_plane<T, 2>(hw, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<A> g = load(grad + i, lanes), v = load(x + i, lanes, mean), d = v - mean;
    const GateOf of(d, rate);
    const Vec<A> gated = g * of.gate, h = gated * v * of.rest * d;
    store(kept + i, gated + h * (2 * scale), lanes);
    return Vecs<A, 2>{h * d, h};
  });
  const A slope = s1 * 8 * scale * scale / A(hw - 1), shift = s2 * 2 * scale / A(hw);
  write_row<T>(grad_x, hw, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<A> d = load(x + i, lanes) - mean;
    return load(kept + i, lanes) - d * slope - shift;
  });
}

// Planes of at most K vectors, P at a time: they stay in registers from the first read to the last, and what is computed
// of one waits for nothing of another.
template <class T, int K>
struct SmallPlanes {
  using A = Acc<T>;
  static constexpr int P = K <= 4 ? 4 : 2, L = kLanes<T>;
  using Planes = std::array<T*, P>;
  int64_t hw;
  Planes x;
  std::array<A, P> mean, scale;  // scale = 1 / q
  std::array<std::array<Vec<A>, K>, P> value;

  template <class F>
  CONVBLOCKS_LOOP void each(F f) const {
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) f(p, k);
    }
  }
  CONVBLOCKS_LOOP Vec<A> get(const T* plane, int k, A fill) const {
    const int64_t left = hw - k * L;
    return left >= L ? load(plane + k * L) : load(plane + k * L, static_cast<int>(std::max<int64_t>(left, 0)), fill);
  }
  CONVBLOCKS_LOOP void put(T* plane, int k, Vec<A> v) const {
    const int64_t left = hw - k * L;
    if (left >= L)
      store(plane + k * L, v);
    else if (left > 0)
      store(plane + k * L, v, static_cast<int>(left));
  }
  CONVBLOCKS_LOOP Vec<A> deviation(int p, int k) const { return value[p][k] - mean[p]; }

  CONVBLOCKS_LOOP SmallPlanes(const Planes& planes, int64_t size, double e_lambda) : hw(size), x(planes) {
    std::array<Vec<A>, P> sum{}, squares{};
    each([&](int p, int k) CONVBLOCKS_LOOP { sum[p] += get(x[p], k, 0); });
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) mean[p] = sum_lanes(sum[p]) / A(hw);
    each([&](int p, int k) CONVBLOCKS_LOOP {
      value[p][k] = get(x[p], k, mean[p]);
      squares[p] += deviation(p, k) * deviation(p, k);
    });
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) scale[p] = 1 / (4 * (sum_lanes(squares[p]) / A(hw - 1) + A(e_lambda)));
  }

  CONVBLOCKS_LOOP GateOf<Vec<A>> gate(int p, int k) const { return {deviation(p, k), A(kLog2E) * scale[p]}; }
  CONVBLOCKS_LOOP void forward(const Planes& y) const {
    each([&](int p, int k) CONVBLOCKS_LOOP { put(y[p], k, value[p][k] * gate(p, k).gate); });
  }
  CONVBLOCKS_LOOP void backward(const Planes& grad, const Planes& grad_x) const {
    std::array<std::array<Vec<A>, K>, P> kept;
    std::array<Vec<A>, P> sum1{}, sum2{};
    each([&](int p, int k) CONVBLOCKS_LOOP {
      const GateOf<Vec<A>> of = gate(p, k);
      const Vec<A> d = deviation(p, k), gated = get(grad[p], k, 0) * of.gate, h = gated * value[p][k] * of.rest * d;
      kept[p][k] = gated + h * (2 * scale[p]);
      sum1[p] += h * d;
      sum2[p] += h;
    });
    std::array<A, P> slope, shift;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      slope[p] = sum_lanes(sum1[p]) * 8 * scale[p] * scale[p] / A(hw - 1);
      shift[p] = sum_lanes(sum2[p]) * 2 * scale[p] / A(hw);
    }
    each([&](int p, int k) CONVBLOCKS_LOOP { put(grad_x[p], k, kept[p][k] - deviation(p, k) * slope[p] - shift[p]); });
  }
};

// Where a plane is small, calls f(planes_of, Small), P channels at a time; planes_of(map) are theirs. The last channel may
// be worked on several times. False where planes are large.
template <class T, class F>
bool for_small_planes(const Context& context, int64_t n, int64_t c, int64_t hw, F f) {
  const auto all = [&]<int K>(std::integral_constant<int, K>) {
    using Small = SmallPlanes<T, K>;
    constexpr int P = Small::P;
    for_each_sample(context, n, c * hw, [&](int64_t i, const Team& team) {
      team.split((c + P - 1) / P, P * hw, [=](int64_t begin, int64_t end) {
        for (int64_t few = begin; few < end; few++) {
          const auto planes_of = [=](const Map& map) {
            typename Small::Planes planes;
            for (int p = 0; p < P; p++) planes[p] = plane_of<T>(map, i, std::min(few * P + p, c - 1));
            return planes;
          };
          f(planes_of, std::type_identity<Small>{});
        }
      });
    });
  };
  const int64_t vectors = (hw + kLanes<T> - 1) / kLanes<T>;
  if (vectors > 7) return false;
  if (vectors <= 1)
    all(std::integral_constant<int, 1>{});
  else if (vectors <= 2)
    all(std::integral_constant<int, 2>{});
  else if (vectors <= 4)
    all(std::integral_constant<int, 4>{});
  else
    all(std::integral_constant<int, 7>{});
  return true;
}

// --- channels_last ----------------------------------------------------------------------------------------------------

template <class T>
struct RowStats {
  Acc<T>*mean, *scale;  // scale = 1 / (4 (v + lambda))
  RowStats(const Team& team, const T* x, int64_t stride, int64_t hw, int64_t c, double e_lambda, Acc<T>* partial,
           Acc<T>* stats)
      : mean(stats), scale(stats + c) {
    using A = Acc<T>;
    A *const m = mean, *const s = scale;
    reduce_rows<T, 1>(team, hw, c, partial, m, [=](int64_t p, int64_t i, auto lanes) CONVBLOCKS_LOOP {
      return Vecs<A, 1>{load(x + p * stride + i, lanes)};
    });
    for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP { store(m + i, load(m + i, lanes) / A(hw), lanes); });
    reduce_rows<T, 1>(team, hw, c, partial, s, [=](int64_t p, int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> d = load(x + p * stride + i, lanes) - load(m + i, lanes);
      return Vecs<A, 1>{d * d};
    });
    for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      store(s + i, 1 / (4 * (load(s + i, lanes) / A(hw - 1) + A(e_lambda))), lanes);
    });
  }
};

template <class T>
void forward_rows(const Team& team, const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t hw, int64_t c,
                  double e_lambda, Acc<T>* workspace, bool far) {
  using A = Acc<T>;
  const RowStats<T> s(team, x, x_stride, hw, c, e_lambda, workspace + 2 * c, workspace);
  const A *mean = s.mean, *scale_of = s.scale;
  team.split(hw, c, [=](int64_t begin, int64_t end) {
    for_lanes<T>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> m = load(mean + i, lanes), rate = A(kLog2E) * load(scale_of + i, lanes);
      write_column(y + i, y_stride, begin, end, lanes, far, [=](int64_t p) CONVBLOCKS_LOOP {
        const Vec<A> v = load(x + p * x_stride + i, lanes);
        return v * GateOf(v - m, rate).gate;
      });
    });
    finish_stores();
  });
}

template <class T>
void backward_rows(const Team& team, const T* grad, int64_t grad_stride, const T* x, int64_t x_stride, T* grad_x,
                   int64_t grad_x_stride, int64_t hw, int64_t c, double e_lambda, Acc<T>* workspace, bool far) {
  using A = Acc<T>;
  const Kept<T> kept_part(grad_x, grad_x_stride, hw * c, far, c);
  A* kept = kept_part.data;
  const int64_t kept_stride = kept_part.stride;
  A *slope = workspace + 2 * c, *shift = slope + c, *partial = shift + c;
  const RowStats<T> s(team, x, x_stride, hw, c, e_lambda, partial, workspace);
  const A *mean = s.mean, *scale_of = s.scale;
  reduce_rows<T, 2>(team, hw, c, partial, slope, [=](int64_t p, int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<A> g = load(grad + p * grad_stride + i, lanes), v = load(x + p * x_stride + i, lanes);
    const Vec<A> d = v - load(mean + i, lanes), scale = load(scale_of + i, lanes);
    const GateOf of(d, A(kLog2E) * scale);
    const Vec<A> gated = g * of.gate, h = gated * v * of.rest * d;
    store(kept + p * kept_stride + i, gated + h * (2 * scale), lanes);
    return Vecs<A, 2>{h * d, h};
  });
  for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
    const Vec<A> scale = load(scale_of + i, lanes);
    store(slope + i, load(slope + i, lanes) * 8 * scale * scale / A(hw - 1), lanes);
    store(shift + i, load(shift + i, lanes) * 2 * scale / A(hw), lanes);
  });
  team.split(hw, c, [=](int64_t begin, int64_t end) {
    for_lanes<T>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> m = load(mean + i, lanes), s1 = load(slope + i, lanes), s2 = load(shift + i, lanes);
      write_column(grad_x + i, grad_x_stride, begin, end, lanes, far, [=](int64_t p) CONVBLOCKS_LOOP {
        return load(kept + p * kept_stride + i, lanes) - (load(x + p * x_stride + i, lanes) - m) * s1 - s2;
      });
    });
    finish_stores();
  });
}

// --- whole maps -------------------------------------------------------------------------------------------------------

// Channels are independent: in channels_last a block of them, in pairs of cache lines (which processors fetch together),
// is worked on like a sample. `maps` is how many values of a pixel and channel have to stay in the cache between the
// passes: those of one thread, or of all, who share a block if there are fewer samples.
template <class T>
struct Blocks {
  int64_t c, width, count;
  Blocks(const Context& context, int64_t n, int64_t channels, int64_t hw, int maps) : c(channels) {
    constexpr int64_t line = 128 / sizeof(T);
    const int64_t budget = (n < context.threads ? context.threads : 1) * (int64_t{4} << 20);
    width = std::clamp(budget / (hw * maps * int64_t{sizeof(Acc<T>)}) / line * line, std::min(line, c), c);
    count = (c + width - 1) / width;
    width = std::min(c, (c + count * line - 1) / (count * line) * line);  // even ones
    count = (c + width - 1) / width;
  }
  template <class F>
  void for_each(const Context& context, int64_t n, int64_t hw, F f) const {
    for_each_sample(context, n * count, width * hw, [&](int64_t task, const Team& team) {
      const int64_t first = task % count * width;
      f(team, task, task / count, first, std::min(width, c - first));
    });
  }
};

template <class T>
void forward(const Context& context, const SimamArgs& a) {
  const bool far = exceeds_caches(a.n * a.c * a.hw * sizeof(T));
  if (a.x.pixel == 1) {
    const bool small = for_small_planes<T>(
        context, a.n, a.c, a.hw,
        [=]<class Small>(auto of, std::type_identity<Small>) { Small(of(a.x), a.hw, a.e_lambda).forward(of(a.y)); });
    if (small) return;
    for_each_sample(context, a.n, a.c * a.hw, [&](int64_t i, const Team& team) {
      team.split(a.c, a.hw, [=](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c++) {
          forward_plane(plane_of<T>(a.x, i, c), plane_of<T>(a.y, i, c), a.hw, a.e_lambda, far);
        }
        finish_stores();
      });
    });
    return;
  }
  const Blocks<T> blocks(context, a.n, a.c, a.hw, 1);
  const int64_t size = 2 * blocks.width + row_sums_size<1>(a.hw, blocks.width);
  auto* workspace = static_cast<Acc<T>*>(context.workspace(context, a.n * blocks.count * size * sizeof(Acc<T>)));
  blocks.for_each(context, a.n, a.hw, [&](const Team& team, int64_t task, int64_t i, int64_t first, int64_t c) {
    forward_rows(team, plane_of<T>(a.x, i, first), a.x.pixel, plane_of<T>(a.y, i, first), a.y.pixel, a.hw, c,
                 a.e_lambda, workspace + task * size, far);
  });
}

template <class T>
void backward(const Context& context, const SimamBackwardArgs& a) {
  using A = Acc<T>;
  const bool far = exceeds_caches(a.n * a.c * a.hw * sizeof(T));
  if (a.x.pixel == 1) {
    const bool small =
        for_small_planes<T>(context, a.n, a.c, a.hw, [=]<class Small>(auto of, std::type_identity<Small>) {
          Small(of(a.x), a.hw, a.e_lambda).backward(of(a.grad), of(a.grad_x));
        });
    if (small) return;
    for_each_sample(context, a.n, 2 * a.c * a.hw, [&](int64_t i, const Team& team) {
      team.split(a.c, 2 * a.hw, [=](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c++) {
          backward_plane(plane_of<T>(a.grad, i, c), plane_of<T>(a.x, i, c), plane_of<T>(a.grad_x, i, c), a.hw,
                         a.e_lambda, far);
        }
        finish_stores();
      });
    });
    return;
  }
  const Blocks<T> blocks(context, a.n, a.c, a.hw, 3);
  const int64_t size = 4 * blocks.width + row_sums_size<2>(a.hw, blocks.width);
  A* workspace = static_cast<A*>(context.workspace(context, a.n * blocks.count * size * sizeof(A)));
  blocks.for_each(context, a.n, a.hw, [&](const Team& team, int64_t task, int64_t i, int64_t first, int64_t c) {
    backward_rows(team, plane_of<T>(a.grad, i, first), a.grad.pixel, plane_of<T>(a.x, i, first), a.x.pixel,
                  plane_of<T>(a.grad_x, i, first), a.grad_x.pixel, a.hw, c, a.e_lambda, workspace + task * size, far);
  });
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_simam(const convblocks::Context& context, const convblocks::SimamArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_simam_backward(const convblocks::Context& context, const convblocks::SimamBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T>(context, args); });
}
