// Scale, shift, residual and activation on CUDA: one pass, of vectors where the layout has them. The backward's tiles leave
// their sums in the workspace, in a row for each chunk and sample; a second kernel adds up the rows.
#include "../scale_shift_act.h"

#include "activation.h"
#include "reduce.h"
#include "tile.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 32;  // of a block that adds up rows, channels across

// What the activation is given.
template <class T>
struct Function {
  Parameter<T> scale, shift;
  Activation activation;
};
// The same for the planes of a thread's column.
template <class T, int P>
struct Inner {
  using A = Acc<T>;
  A scale[P], shift[P];
  __device__ Inner(const Function<T>& f, const Place& at) {
#pragma unroll
    for (int p = 0; p < P; p++) {
      scale[p] = f.scale[int64_t{at.column} * P + p];
      shift[p] = f.shift[int64_t{at.column} * P + p];
    }
  }
  __device__ A operator()(T value, int e) const { return static_cast<A>(value) * scale[e % P] + shift[e % P]; }
};

template <class T, int V, int P, bool kResidual>
__global__ void __launch_bounds__(kStreamThreads, 2)
    forward_kernel(View<const T> x, View<const T> residual, View<T> y, Tiling tiling, Function<T> f) {
  using A = Acc<T>;
  const Place at(tiling, blockIdx.x);
  if (at.count == 0) return;
  const Inner<T, P> inner(f, at);
  T* const out = at.in(y);
  const int64_t step = at.step * y.vector;
  if constexpr (kResidual) {
    for_each_vector<V>(at, x, residual, [&](int k, Vec<T, V> v, const Vec<T, V>& r) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        v.data[e] = static_cast<T>(activate(inner(v.data[e], e) + static_cast<A>(r.data[e]), f.activation));
      }
      store(out + k * step, v);
    });
  } else {
    for_each_vector<V>(at, x, [&](int k, Vec<T, V> v) {
#pragma unroll
      for (int e = 0; e < V; e++) v.data[e] = static_cast<T>(activate(inner(v.data[e], e), f.activation));
      store(out + k * step, v);
    });
  }
}

// The maps that the backward reads and writes; those of the residual only where it has its own.
template <class T>
struct BackwardMaps {
  View<const T> grad, x, residual;
  View<T> grad_x, grad_residual;
};

// Sums for the scales and the shifts, each [row][channel].
template <class A>
struct Rows {
  A *scale, *shift;
  int64_t count, channels;
};

template <class T, int V, int P, bool kResidual>
__global__ void __launch_bounds__(kStreamThreads, 2)
    backward_kernel(BackwardMaps<T> maps, Tiling tiling, Function<T> f, Rows<Acc<T>> rows) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Place at(tiling, blockIdx.x);
  const Inner<T, P> inner(f, at);
  T *const out = at.in(maps.grad_x), *const residual_out = kResidual ? at.in(maps.grad_residual) : nullptr;
  const int64_t step = at.step * maps.grad_x.vector;
  A sums[2 * P] = {};  // for the scales, then for the shifts
  const auto see = [&](int k, const Vec<T, V>& grad, const Vec<T, V>& x, const Vec<T, V>* residual) {
    Vec<T, V> grad_x, grad_residual;
    A g[V];
#pragma unroll
    for (int e = 0; e < V; e++) {
      A z = inner(x.data[e], e);
      if constexpr (kResidual) z += static_cast<A>(residual->data[e]);
      g[e] = activation_grad(static_cast<A>(grad.data[e]), z, f.activation);
      grad_x.data[e] = static_cast<T>(g[e] * inner.scale[e % P]);
      if constexpr (kResidual) grad_residual.data[e] = static_cast<T>(g[e]);
    }
    store(out + k * step, grad_x);
    if constexpr (kResidual) store(residual_out + k * step, grad_residual);
    add_vector<V, P>(sums, [&](int e) { return g[e] * static_cast<A>(x.data[e]); });
    add_vector<V, P>(sums + P, [&](int e) { return g[e]; });
  };
  if constexpr (kResidual) {
    for_each_vectors<V>(at, {maps.grad, maps.x, maps.residual},
                        [&](int k, const Vec<T, V>(&v)[3]) { see(k, v[0], v[1], &v[2]); });
  } else {
    for_each_vector<V>(at, maps.grad, maps.x,
                       [&](int k, const Vec<T, V>& grad, const Vec<T, V>& x) { see(k, grad, x, nullptr); });
  }
  team_reduce(sums, tiling.width, shared);
  if (at.row != 0 || !at.valid) return;
  const int64_t row = int64_t{at.chunk} * tiling.samples + at.sample;
  for (int p = 0; p < P; p++) {
    const int64_t i = row * rows.channels + int64_t{at.column} * P + p;
    rows.scale[i] = sums[p];
    rows.shift[i] = sums[P + p];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    channels_kernel(Rows<Acc<T>> rows, Parameter<T> grad_scale, Parameter<T> grad_shift) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const int64_t channel = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  const int own_row = threadIdx.x / kColumns;
  A sums[2] = {};
  if (channel < rows.channels) {
    for (int64_t row = own_row; row < rows.count; row += kThreads / kColumns) {
      sums[0] += rows.scale[row * rows.channels + channel];
      sums[1] += rows.shift[row * rows.channels + channel];
    }
  }
  team_reduce(sums, kColumns, shared);
  if (own_row != 0 || channel >= rows.channels) return;
  grad_scale.set(channel, sums[0]);
  grad_shift.set(channel, sums[1]);
}

template <class T, class Args>
Function<T> function_of(const Args& args) {
  return {{args.channels.scale, args.channels.dtype}, {args.channels.shift, args.channels.dtype}, args.activation};
}

template <class T>
const char* forward(const Context& context, const ScaleShiftActArgs& args) {
  const bool has_residual = args.residual.data != nullptr;
  const Map& residual = has_residual ? args.residual : args.x;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, residual, args.y}, layout)) return error;
  const Tiling tiling = map_tiling(layout);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const auto kernel = has_residual ? forward_kernel<T, V, P, true> : forward_kernel<T, V, P, false>;
    CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), 0, stream_of(context), layout.view<const T>(args.x),
              layout.view<const T>(residual), layout.view<T>(args.y), tiling, function_of<T>(args));
  });
  return launch_error();
}

template <class T>
const char* backward(const Context& context, const ScaleShiftActBackwardArgs& args) {
  using A = Acc<T>;
  const bool has_residual = args.residual.data != nullptr;
  const Map &residual = has_residual ? args.residual : args.x,
            &grad_residual = has_residual ? args.grad_residual : args.grad_x;
  Layout layout;
  if (const char* error =
          find_layout<T>(args.n, args.c, args.hw, {args.grad, args.x, residual, args.grad_x, grad_residual}, layout))
    return error;
  const Tiling tiling = sum_tiling(layout);
  const int64_t count = args.n * tiling.chunks;
  Workspace<A> workspace(context, 2 * count * args.c);
  const Rows<A> rows{workspace.take(count * args.c), workspace.take(count * args.c), count, args.c};
  const BackwardMaps<T> maps{layout.view<const T>(args.grad), layout.view<const T>(args.x),
                             layout.view<const T>(residual), layout.view<T>(args.grad_x),
                             layout.view<T>(grad_residual)};
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const auto kernel = has_residual ? backward_kernel<T, V, P, true> : backward_kernel<T, V, P, false>;
    CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), tiling.reduce_bytes<A>(2 * P), stream_of(context), maps, tiling,
              function_of<T>(args), rows);
  });
  const Parameter<T> grad_scale(args.grad_scale, args.channels.dtype), grad_shift(args.grad_shift, args.channels.dtype);
  CB_LAUNCH(channels_kernel<T>, ceil_div(args.c, kColumns), kThreads, kThreads / 32 * kColumns * 2 * sizeof(A),
            stream_of(context), rows, grad_scale, grad_shift);
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_scale_shift_act(const Context& context, const ScaleShiftActArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::forward<T>(context, args); });
}

const char* convblocks_scale_shift_act_backward(const Context& context, const ScaleShiftActBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::backward<T>(context, args); });
}
