// Scale, shift, residual and activation on the CPU: each map is read or written once, in the order of memory. The backward
// sums over each sample, then over the samples.
#include "../scale_shift_act.h"

#include "dispatch.h"
#include "gate.h"
#include "weights.h"

namespace convblocks::cpu {
namespace {

template <class T>
T* at(const Map& map, int64_t sample, int64_t channel, int64_t pixel = 0) {
  return static_cast<T*>(map.data) + sample * map.batch + channel * map.channel + pixel * map.pixel;
}

// Calls f(activation, has_residual): those activations as constants whose cost is that of choosing them.
template <class T, class F>
void choose(Activation activation, const Map& residual, F f) {
  const auto with = [&](auto kind) { residual.data ? f(kind, std::true_type{}) : f(kind, std::false_type{}); };
  if (activation == Activation::none) return with(std::integral_constant<Activation, Activation::none>{});
  if (activation == Activation::relu) return with(std::integral_constant<Activation, Activation::relu>{});
  if constexpr (std::is_same_v<T, float>) {
    switch (activation) {
      case Activation::relu6: return with(std::integral_constant<Activation, Activation::relu6>{});
      case Activation::hardswish: return with(std::integral_constant<Activation, Activation::hardswish>{});
      case Activation::leaky_relu: return with(std::integral_constant<Activation, Activation::leaky_relu>{});
      default: break;
    }
  }
  with(activation);
}

// How many planes of a sample, side by side, are written as one row: so many that few vectors are parts of one, where
// planes are short and the activation takes so long that a scale and a shift for each value cost less. Else 0.
template <class T>
int64_t planes_of_row(const ScaleShiftActArgs& a) {
  constexpr int64_t L = kLanes<T>;
  const Activation k = a.activation;
  const bool slow = k == Activation::silu || k == Activation::gelu || k == Activation::gelu_tanh;
  if (!slow || a.x.pixel != 1 || a.hw % L == 0 || a.hw > 4 * L) return 0;
  const bool dense = a.x.channel == a.hw && a.y.channel == a.hw && (!a.residual.data || a.residual.channel == a.hw);
  const int64_t most = 1024 / a.hw, rows = (a.c + most - 1) / most;
  return dense ? (a.c + rows - 1) / rows : 0;
}

template <class T>
void forward(const Context& context, const ScaleShiftActArgs& a) {
  using A = Acc<T>;
  const A *scales = widened<A>(context, a.channels.scale, a.channels.dtype, a.c),
          *shifts = widened<A>(context, a.channels.shift, a.channels.dtype, a.c);
  const bool far = a.x.data != a.y.data && exceeds_caches(a.n * a.c * a.hw * sizeof(T));
  const int64_t planes = planes_of_row<T>(a);
  choose<T>(a.activation, a.residual, [&]<class R>(auto activation, R) {
    // `size` values that have a scale and a shift each.
    const auto write = [far, activation](T* y, const T* x, const T* residual, int64_t size, const A* scale,
                                         const A* shift) CONVBLOCKS_LOOP {
      write_row<T>(y, size, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        Vec<A> z = multiply_add(load(x + i, lanes), load(scale + i, lanes), load(shift + i, lanes));
        if constexpr (R::value) z += load(residual + i, lanes);
        return activate(z, activation);
      });
    };
    if (planes) {
      const int64_t values = planes * a.hw, rows = (a.c + planes - 1) / planes;
      parallel_for(context, rows * a.n, std::max<int64_t>(1, 16384 / values), [&](int64_t begin, int64_t end) {
        const Scratch<A> scratch(2 * values);
        A *const scale = scratch.data(), *const shift = scale + values;
        for (int64_t i = begin; i < end; i++) {
          const int64_t sample = i % a.n, c = i / a.n * planes, count = std::min(planes, a.c - c);
          for (int64_t k = 0; k < count && (i == begin || sample == 0); k++) {
            std::fill_n(scale + k * a.hw, a.hw, scales[c + k]);
            std::fill_n(shift + k * a.hw, a.hw, shifts[c + k]);
          }
          const T *x = at<T>(a.x, sample, c), *residual = R::value ? at<T>(a.residual, sample, c) : x;
          write(at<T>(a.y, sample, c), x, residual, count * a.hw, scale, shift);
        }
        finish_stores();
      });
      return;
    }
    if (a.x.pixel == 1) {
      parallel_for(context, a.n * a.c, std::max<int64_t>(1, 16384 / a.hw), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; plane++) {
          const int64_t sample = plane / a.c, c = plane % a.c;
          const T *x = at<T>(a.x, sample, c), *residual = R::value ? at<T>(a.residual, sample, c) : x;
          const auto scale = splat<Vec<A>>(scales[c]), shift = splat<Vec<A>>(shifts[c]);
          write_row<T>(at<T>(a.y, sample, c), a.hw, far, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
            Vec<A> z = multiply_add(load(x + i, lanes), scale, shift);
            if constexpr (R::value) z += load(residual + i, lanes);
            return activate(z, activation);
          });
        }
        finish_stores();
      });
      return;
    }
    parallel_for(context, a.n * a.hw, std::max<int64_t>(1, 16384 / a.c), [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; pixel++) {
        const int64_t sample = pixel / a.hw, p = pixel % a.hw;
        const T *x = at<T>(a.x, sample, 0, p), *residual = R::value ? at<T>(a.residual, sample, 0, p) : x;
        write(at<T>(a.y, sample, 0, p), x, residual, a.c, scales, shifts);
      }
      finish_stores();
    });
  });
}

// Values of all maps that lie side by side in memory: those of a plane, or of the channels of a pixel.
template <class T, bool kResidual>
struct Run {
  const T *grad, *x, *residual;
  T *grad_x, *grad_residual;
  Run(const ScaleShiftActBackwardArgs& a, int64_t sample, int64_t channel, int64_t pixel = 0)
      : grad(at<T>(a.grad, sample, channel, pixel)), x(at<T>(a.x, sample, channel, pixel)),
        residual(kResidual ? at<T>(a.residual, sample, channel, pixel) : x),
        grad_x(at<T>(a.grad_x, sample, channel, pixel)),
        grad_residual(kResidual ? at<T>(a.grad_residual, sample, channel, pixel) : grad_x) {}

  // Writes the gradients of the maps, and returns what they add to those of scale and shift.
  template <class V, class K, class L>
  CONVBLOCKS_LOOP Vecs<Acc<T>, 2> backward(int64_t i, L lanes, V scale, V shift, K activation) const {
    const V value = load(x + i, lanes);
    V g = load(grad + i, lanes);
    if (activation != Activation::none) {
      V z = value * scale + shift;
      if constexpr (kResidual) z += load(residual + i, lanes);
      g = activation_backward(g, z, activation);
    }
    store(grad_x + i, g * scale, lanes);
    if constexpr (kResidual) store(grad_residual + i, g, lanes);
    return {g * value, g};
  }
};

template <class T>
void backward(const Context& context, const ScaleShiftActBackwardArgs& a) {
  using A = Acc<T>;
  const int64_t n = a.n, c = a.c, hw = a.hw;
  const A *scales = widened<A>(context, a.channels.scale, a.channels.dtype, c),
          *shifts = widened<A>(context, a.channels.shift, a.channels.dtype, c);
  // Of each sample the sums for the scales, then for the shifts; and those of its parts.
  const int64_t size = 2 * c + (a.x.pixel == 1 ? 0 : row_sums_size<2>(hw, c));
  A* workspace = static_cast<A*>(context.workspace(context, n * size * sizeof(A)));
  choose<T>(a.activation, a.residual, [&]<class R>(auto activation, R) {
    for_each_sample(context, n, 2 * c * hw, [&](int64_t sample, const Team& team) {
      A* sums = workspace + sample * size;
      if (a.x.pixel == 1) {
        team.split(c, 2 * hw, [=](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) {
            const Run<T, R::value> run(a, sample, i);
            const auto scale = splat<Vec<A>>(scales[i]), shift = splat<Vec<A>>(shifts[i]);
            const auto both = reduce_plane<T, 2>(hw, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP {
              return run.backward(p, lanes, scale, shift, activation);
            });
            sums[i] = both[0];
            sums[c + i] = both[1];
          }
        });
      } else {
        reduce_rows<T, 2>(team, hw, c, sums + 2 * c, sums, [=](int64_t p, int64_t i, auto lanes) CONVBLOCKS_LOOP {
          const Run<T, R::value> run(a, sample, 0, p);
          return run.backward(i, lanes, load(scales + i, lanes), load(shifts + i, lanes), activation);
        });
      }
    });
  });
  const Narrowed<A> grad_scale(context, a.grad_scale, a.channels.dtype, c),
      grad_shift(context, a.grad_shift, a.channels.dtype, c);
  for (int64_t i = 0; i < 2 * c; i++) {
    double total = 0;
    for (int64_t sample = 0; sample < n; sample++) total += workspace[sample * size + i];
    (i < c ? grad_scale : grad_shift)[i % c] = static_cast<A>(total);
  }
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_scale_shift_act(const convblocks::Context& context, const convblocks::ScaleShiftActArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_scale_shift_act_backward(const convblocks::Context& context,
                                                const convblocks::ScaleShiftActBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T>(context, args); });
}
