// SimAM on the CPU. A plane (NCHW) or a sample (channels_last) is read three times, from memory only once while it fits
// in the cache: mean, variance, result. The backward keeps the gate's part of the result in the output between its passes.
#include "../simam.h"

#include <vector>

#include "dispatch.h"
#include "reduce.h"

namespace convblocks::cpu {
namespace {

template <class T>
T* plane_of(const Map& map, int64_t sample, int64_t channel) {
  return static_cast<T*>(map.data) + sample * map.batch + channel * map.channel;
}

// --- NCHW -------------------------------------------------------------------------------------------------------------

template <class T>
struct PlaneStats {
  Acc<T> mean, q;  // q = 4 (v + lambda)
  PlaneStats(const T* x, int64_t hw, double e_lambda) {
    using A = Acc<T>;
    mean = reduce_plane<T, 1>(hw, [&](int64_t i, auto lanes) { return Vecs<A, 1>{load(x + i, lanes)}; })[0] / A(hw);
    const A spread = reduce_plane<T, 1>(hw, [&](int64_t i, auto lanes) {
      const Vec<A> d = load(x + i, lanes, mean) - mean;
      return Vecs<A, 1>{d * d};
    })[0];
    q = 4 * (spread / A(hw - 1) + A(e_lambda));
  }
};

template <class T>
void forward_plane(const T* x, T* y, int64_t hw, double e_lambda, bool far) {
  const PlaneStats<T> s(x, hw, e_lambda);
  const Acc<T> scale = 1 / s.q;
  write_row<T>(y, hw, far, [&](int64_t i, auto lanes) {
    const auto v = load(x + i, lanes), d = v - s.mean;
    return v * sigmoid(d * d * scale + Acc<T>(0.5));
  });
}

// `kept` holds a plane in the precision of the sums; it may be grad_x itself.
template <class T>
void backward_plane(const T* grad, const T* x, T* grad_x, Acc<T>* kept, int64_t hw, double e_lambda) {
  using A = Acc<T>;
  const PlaneStats<T> s(x, hw, e_lambda);
  const A scale = 1 / s.q;
  const auto [s1, s2] = reduce_plane<T, 2>(hw, [&](int64_t i, auto lanes) {
    const Vec<A> g = load(grad + i, lanes), v = load(x + i, lanes, s.mean), d = v - s.mean;
    const Vec<A> gate = sigmoid(d * d * scale + A(0.5));
    const Vec<A> h = g * v * gate * (1 - gate) * d;
    store(kept + i, g * gate + h * (2 * scale), lanes);
    return Vecs<A, 2>{h * d, h};
  });
  const A slope = s1 * 8 * scale * scale / A(hw - 1), shift = s2 * 2 * scale / A(hw);
  for_lanes<T>(hw, [&](int64_t i, auto lanes) {
    const Vec<A> d = load(x + i, lanes) - s.mean;
    store(grad_x + i, load(kept + i, lanes) - d * slope - shift, lanes);
  });
}

// --- channels_last ----------------------------------------------------------------------------------------------------

template <class T>
struct RowStats {
  Acc<T>*mean, *scale;  // scale = 1 / (4 (v + lambda))
  RowStats(const Team& team, const T* x, int64_t stride, int64_t hw, int64_t c, double e_lambda, Acc<T>* partial,
           Acc<T>* stats)
      : mean(stats), scale(stats + c) {
    using A = Acc<T>;
    reduce_rows<T, 1>(team, hw, c, partial, mean, [&](int64_t p, int64_t i, auto lanes) {
      return Vecs<A, 1>{load(x + p * stride + i, lanes)};
    });
    for_lanes<A>(c, [&](int64_t i, auto lanes) { store(mean + i, load(mean + i, lanes) / A(hw), lanes); });
    reduce_rows<T, 1>(team, hw, c, partial, scale, [&](int64_t p, int64_t i, auto lanes) {
      const Vec<A> d = load(x + p * stride + i, lanes) - load(mean + i, lanes);
      return Vecs<A, 1>{d * d};
    });
    for_lanes<A>(c, [&](int64_t i, auto lanes) {
      store(scale + i, 1 / (4 * (load(scale + i, lanes) / A(hw - 1) + A(e_lambda))), lanes);
    });
  }
};

template <class T>
void forward_rows(const Team& team, const T* x, int64_t x_stride, T* y, int64_t hw, int64_t c, double e_lambda,
                  Acc<T>* workspace, bool far) {
  using A = Acc<T>;
  const RowStats<T> s(team, x, x_stride, hw, c, e_lambda, workspace + 2 * c, workspace);
  team.split(hw, c, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      write_row<T>(y + p * c, c, far, [&](int64_t i, auto lanes) {
        const Vec<A> v = load(x + p * x_stride + i, lanes), d = v - load(s.mean + i, lanes);
        return v * sigmoid(d * d * load(s.scale + i, lanes) + A(0.5));
      });
    }
    finish_stores();
  });
}

template <class T>
void backward_rows(const Team& team, const T* grad, int64_t grad_stride, const T* x, int64_t x_stride, T* grad_x,
                   Acc<T>* kept, int64_t hw, int64_t c, double e_lambda, Acc<T>* workspace) {
  using A = Acc<T>;
  A *slope = workspace + 2 * c, *shift = slope + c, *partial = shift + c;
  const RowStats<T> s(team, x, x_stride, hw, c, e_lambda, partial, workspace);
  reduce_rows<T, 2>(team, hw, c, partial, slope, [&](int64_t p, int64_t i, auto lanes) {
    const Vec<A> g = load(grad + p * grad_stride + i, lanes), v = load(x + p * x_stride + i, lanes);
    const Vec<A> d = v - load(s.mean + i, lanes), scale = load(s.scale + i, lanes);
    const Vec<A> gate = sigmoid(d * d * scale + A(0.5));
    const Vec<A> h = g * v * gate * (1 - gate) * d;
    store(kept + p * c + i, g * gate + h * (2 * scale), lanes);
    return Vecs<A, 2>{h * d, h};
  });
  for_lanes<A>(c, [&](int64_t i, auto lanes) {
    const Vec<A> scale = load(s.scale + i, lanes);
    store(slope + i, load(slope + i, lanes) * 8 * scale * scale / A(hw - 1), lanes);
    store(shift + i, load(shift + i, lanes) * 2 * scale / A(hw), lanes);
  });
  team.split(hw, c, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) {
      for_lanes<T>(c, [&](int64_t i, auto lanes) {
        const Vec<A> d = load(x + p * x_stride + i, lanes) - load(s.mean + i, lanes);
        const Vec<A> rest = d * load(slope + i, lanes) + load(shift + i, lanes);
        store(grad_x + p * c + i, load(kept + p * c + i, lanes) - rest, lanes);
      });
    }
  });
}

// --- whole maps -------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Context& context, const SimamArgs& a) {
  const int64_t size = 2 * a.c + row_sums_size<1>(a.hw, a.c);
  const bool far = exceeds_caches(context, a.n * a.c * a.hw * sizeof(T));
  auto* workspace = a.x.pixel == 1 ? nullptr : static_cast<Acc<T>*>(context.workspace(context, a.n * size * sizeof(Acc<T>)));
  for_each_sample(context, a.n, a.c * a.hw, [&](int64_t i, const Team& team) {
    if (a.x.pixel == 1) {
      team.split(a.c, a.hw, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c++) {
          forward_plane(plane_of<T>(a.x, i, c), plane_of<T>(a.y, i, c), a.hw, a.e_lambda, far);
        }
        finish_stores();
      });
    } else {
      forward_rows(team, plane_of<T>(a.x, i, 0), a.x.pixel, plane_of<T>(a.y, i, 0), a.hw, a.c, a.e_lambda,
                   workspace + i * size, far);
    }
  });
}

template <class T>
void backward(const Context& context, const SimamBackwardArgs& a) {
  using A = Acc<T>;
  constexpr bool in_place = std::is_same_v<T, A>;  // else the output is too coarse to keep sums' terms in
  const int64_t size = 4 * a.c + row_sums_size<2>(a.hw, a.c);
  A* workspace = a.x.pixel == 1 ? nullptr : static_cast<A*>(context.workspace(context, a.n * size * sizeof(A)));
  for_each_sample(context, a.n, a.c * a.hw, [&](int64_t i, const Team& team) {
    const auto kept_in = [&](T* grad_x, std::vector<A>& scratch, int64_t elements) -> A* {
      if constexpr (in_place) return grad_x;
      scratch.resize(elements);
      return scratch.data();
    };
    if (a.x.pixel == 1) {
      team.split(a.c, 2 * a.hw, [&](int64_t begin, int64_t end) {
        std::vector<A> scratch;
        for (int64_t c = begin; c < end; c++) {
          T* grad_x = plane_of<T>(a.grad_x, i, c);
          backward_plane(plane_of<T>(a.grad, i, c), plane_of<T>(a.x, i, c), grad_x, kept_in(grad_x, scratch, a.hw), a.hw,
                         a.e_lambda);
        }
      });
    } else {
      std::vector<A> scratch;
      T* grad_x = plane_of<T>(a.grad_x, i, 0);
      backward_rows(team, plane_of<T>(a.grad, i, 0), a.grad.pixel, plane_of<T>(a.x, i, 0), a.x.pixel, grad_x,
                    kept_in(grad_x, scratch, a.hw * a.c), a.hw, a.c, a.e_lambda, workspace + i * size);
    }
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
