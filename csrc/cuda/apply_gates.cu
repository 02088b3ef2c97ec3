// Gates of channels and pixels on CUDA: one pass. The backward's tiles leave sums over their pixels and sums over their
// channels in the workspace; two small kernels add them up.
#include "../apply_gates.h"

#include "pixel_gate.h"

namespace convblocks::cuda {
namespace {

template <class T>
struct Factors {
  GateValues<T> channel, spatial;  // [sample][channel], [sample][pixel]
  Acc<T> more;                     // 1 with the residual
};

// Planes: the lanes of a warp lie side by side along the pixels, and the warps of a block take turns at its kChannels
// channels, so that a pixel's gate is read once for several of them.
constexpr int kChannels = 64;
struct Stretch {
  int64_t sample, first, end, vector;  // channels from first + the warp's number on
  int along, across;                   // place of the block
  bool inside;
  __device__ Stretch(const Layout& l, int alongs, int acrosses) {
    const Quotient place = divide(blockIdx.x, alongs), group = divide(place.quotient, acrosses);
    sample = group.quotient;
    along = place.remainder;
    across = group.remainder;
    first = int64_t{across} * kChannels;
    end = min(first + kChannels, l.columns);
    vector = int64_t{along} * 32 + threadIdx.x % 32;
    inside = vector < l.height;
  }
  template <class T>
  __device__ T* in(const View<T>& map, int64_t channel) const {
    return map.data + sample * map.sample + channel * map.column + vector * map.vector;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads, 2)
    forward_planes_kernel(View<const T> x, View<T> y, Layout layout, int along, int across, Factors<T> gates) {
  using A = Acc<T>;
  const Stretch at(layout, along, across);
  if (!at.inside) return;
  A spatial[V];
#pragma unroll
  for (int e = 0; e < V; e++) spatial[e] = gates.spatial[(at.sample * layout.height + at.vector) * V + e];
#pragma unroll 2
  for (int64_t c = at.first + threadIdx.x / 32; c < at.end; c += kPixelThreads / 32) {
    const A channel = gates.channel[at.sample * layout.columns + c];
    Vec<T, V> v = load<V>(at.in(x, c));
#pragma unroll
    for (int e = 0; e < V; e++) {
      v.data[e] = static_cast<T>(static_cast<A>(v.data[e]) * (channel * spatial[e] + gates.more));
    }
    store(at.in(y, c), v);
  }
}

// channels_last: a tile of neighbouring columns; its threads go along the pixels.
template <class T, int V>
__global__ void __launch_bounds__(kStreamThreads, 2)
    forward_rows_kernel(View<const T> x, View<T> y, Tiling tiling, Factors<T> gates) {
  using A = Acc<T>;
  const Place at(tiling, blockIdx.x);
  if (at.count == 0) return;
  A channel[V];
#pragma unroll
  for (int e = 0; e < V; e++) channel[e] = gates.channel[(int64_t{at.sample} * tiling.columns + at.column) * V + e];
  T* const out = at.in(y);
  const int64_t step = at.step * y.vector, first = at.sample * tiling.height + at.first;
  for_each_vector<V>(at, x, [&](int k, Vec<T, V> v) {
    const A spatial = gates.spatial[first + int64_t{k} * at.step];
#pragma unroll
    for (int e = 0; e < V; e++) {
      v.data[e] = static_cast<T>(static_cast<A>(v.data[e]) * (channel[e] * spatial + gates.more));
    }
    store(out + k * step, v);
  });
}

template <class T>
struct BackwardMaps {
  View<const T> grad, x;
  View<T> grad_x;
};

// What the tiles leave: sums over pixels [sample][tile along][channel], over channels [sample][tile across][pixel].
template <class A>
struct Parts {
  A *channel, *spatial;
  int along, across;
};

// Of a vector of grad and of x: writes that of grad_x, adds to the sums by channel and by pixel.
template <class T, int V, int P>
__device__ void backward_vector(const Vec<T, V>& grad, const Vec<T, V>& x, T* to, const Acc<T> (&channel)[P],
                                const Acc<T> (&spatial)[V / P], Acc<T> more, Acc<T> (&by_channel)[P],
                                Acc<T> (&by_pixel)[V / P]) {
  using A = Acc<T>;
  Vec<T, V> out;
  A product[V];
#pragma unroll
  for (int e = 0; e < V; e++) {
    const A g = static_cast<A>(grad.data[e]);
    product[e] = g * static_cast<A>(x.data[e]);
    out.data[e] = static_cast<T>(g * (channel[e % P] * spatial[e / P] + more));
  }
  store(to, out);
  add_vector<V, P>(by_channel, [&](int e) { return product[e] * spatial[e / P]; });
#pragma unroll
  for (int e = 0; e < V; e++) by_pixel[e / P] += product[e] * channel[e % P];
}

template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads, 2)
    backward_planes_kernel(BackwardMaps<T> maps, Layout layout, Factors<T> gates, Parts<Acc<T>> parts) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Stretch at(layout, parts.along, parts.across);
  A spatial[V], by_pixel[V] = {};
#pragma unroll
  for (int e = 0; e < V; e++) {
    spatial[e] = at.inside ? gates.spatial[(at.sample * layout.height + at.vector) * V + e] : A(0);
  }
  for (int64_t c = at.first + threadIdx.x / 32; c < at.end; c += kPixelThreads / 32) {
    const A channel[1] = {gates.channel[at.sample * layout.columns + c]};
    A by_channel[1] = {};
    if (at.inside) {
      backward_vector<T, V, 1>(load<V>(at.in(maps.grad, c)), load<V>(at.in(maps.x, c)), at.in(maps.grad_x, c), channel,
                               spatial, gates.more, by_channel, by_pixel);
    }
    const A total = warp_reduce(by_channel[0]);
    if (threadIdx.x % 32 == 0) parts.channel[(at.sample * parts.along + at.along) * layout.columns + c] = total;
  }
  team_reduce(by_pixel, 32, shared);
  if (threadIdx.x >= 32 || !at.inside) return;
  const int64_t out = (at.sample * parts.across + at.across) * layout.height + at.vector;
#pragma unroll
  for (int e = 0; e < V; e++) parts.spatial[out * V + e] = by_pixel[e];
}

template <class T, int V>
__global__ void __launch_bounds__(kStreamThreads, 2)
    backward_rows_kernel(BackwardMaps<T> maps, Tiling tiling, Factors<T> gates, Parts<Acc<T>> parts) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Place at(tiling, blockIdx.x);
  const int group = at.valid ? divide(at.column, tiling.width).quotient : 0;
  A channel[V], by_channel[V] = {};
#pragma unroll
  for (int p = 0; p < V; p++) channel[p] = gates.channel[(int64_t{at.sample} * tiling.columns + at.column) * V + p];
  T* const to = at.in(maps.grad_x);
  const T *const grad = at.in(maps.grad), *const x = at.in(maps.x);
  const int64_t pixels = at.sample * tiling.height;
  // All lanes of a warp take as many turns: they add up a pixel together.
  for (int64_t turn = 0; turn * at.step < tiling.length; turn++) {
    const bool inside = turn < at.count;
    const int64_t pixel = at.first + turn * at.step, step = turn * at.step;
    A by_pixel[1] = {};
    if (inside) {
      const A spatial[1] = {gates.spatial[pixels + pixel]};
      backward_vector<T, V, V>(load<V>(grad + step * maps.grad.vector), load<V>(x + step * maps.x.vector),
                               to + step * maps.grad_x.vector, channel, spatial, gates.more, by_channel, by_pixel);
    }
    const A total = warp_reduce(by_pixel[0], 1, Sum(), tiling.width);
    if (inside && at.lane == 0) {
      parts.spatial[(int64_t{at.sample} * parts.across + group) * tiling.height + pixel] = total;
    }
  }
  team_reduce(by_channel, tiling.width, shared);
  if (at.row != 0 || !at.valid) return;
#pragma unroll
  for (int p = 0; p < V; p++) {
    const int64_t column = (int64_t{at.sample} * parts.along + at.chunk) * tiling.columns + at.column;
    parts.channel[column * V + p] = by_channel[p];
  }
}

template <class T, class Args>
Factors<T> factors_of(const Args& args) {
  const Gates& g = args.gates;
  return {{{g.channel, g.dtype}}, {{g.spatial, g.dtype}}, Acc<T>(g.residual)};
}

template <class T>
const char* forward(const Context& context, const ApplyGatesArgs& args) {
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.y}, layout)) return error;
  const Tiling tiling = map_tiling(layout);
  const int along = ceil_div(layout.height, 32), across = ceil_div(args.c, kChannels);
  const auto x = layout.view<const T>(args.x);
  const auto y = layout.view<T>(args.y);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    if (layout.channels_last) {
      const auto kernel = forward_rows_kernel<T, V>;
      CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), 0, stream_of(context), x, y, tiling, factors_of<T>(args));
    } else {
      const auto kernel = forward_planes_kernel<T, V>;
      CB_LAUNCH(kernel, args.n * along * across, kPixelThreads, 0, stream_of(context), x, y, layout, along, across,
                factors_of<T>(args));
    }
  });
  return launch_error();
}

template <class T>
const char* backward(const Context& context, const ApplyGatesBackwardArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.grad, args.x, args.grad_x}, layout))
    return error;
  const Tiling tiling = sum_tiling(layout);
  Parts<A> parts{};
  if (layout.channels_last) {
    parts.along = tiling.chunks;
    parts.across = tiling.groups;
  } else {
    parts.along = ceil_div(layout.height, 32);
    parts.across = ceil_div(args.c, kChannels);
  }
  Workspace<A> workspace(context, args.n * (parts.along * args.c + parts.across * args.hw));
  parts.channel = workspace.take(args.n * parts.along * args.c);
  parts.spatial = workspace.take(args.n * parts.across * args.hw);
  const BackwardMaps<T> maps{layout.view<const T>(args.grad), layout.view<const T>(args.x),
                             layout.view<T>(args.grad_x)};
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    if (layout.channels_last) {
      const auto kernel = backward_rows_kernel<T, V>;
      CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), tiling.reduce_bytes<A>(V), stream_of(context), maps, tiling,
                factors_of<T>(args), parts);
    } else {
      const auto kernel = backward_planes_kernel<T, V>;
      CB_LAUNCH(kernel, args.n * parts.along * parts.across, kPixelThreads, kPixelThreads * V * sizeof(A),
                stream_of(context), maps, layout, factors_of<T>(args), parts);
    }
  });
  add_parts<T>(context, parts.channel, args.n, parts.along, args.c, args.grad_channel, args.gates.dtype);
  add_parts<T>(context, parts.spatial, args.n, parts.across, args.hw, args.grad_spatial, args.gates.dtype);
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_apply_gates(const Context& context, const ApplyGatesArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::forward<T>(context, args); });
}

const char* convblocks_apply_gates_backward(const Context& context, const ApplyGatesBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::backward<T>(context, args); });
}
