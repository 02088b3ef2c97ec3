// Mean and maximum over the channels on CUDA. The threads of a team share the channels of a spot: a vector of pixels
// (NCHW), or a pixel (channels_last). Backward: the same pass finds the maxima again, and how many channels have them; then
// the gradient of the map is written, and that of the channels' gates summed: of planes by the same threads, of
// channels_last in a second pass.
#include "../channel_pool.h"

#include "pixel_gate.h"

namespace convblocks::cuda {
namespace {

// Where a spot's threads are. NCHW: 32 spots side by side, the warps of a block share their channels. channels_last: as
// many lanes as there are columns, at most a warp, share a pixel.
struct Spots {
  int samples;
  int64_t columns, height;
  int width, members;  // spots across a team, and threads of a spot

  explicit Spots(const Layout& l)
      : samples(l.samples), columns(l.columns), height(l.height), width(l.channels_last ? 1 : 32),
        members(l.channels_last ? tile_width(l, 32) : kPixelThreads / 32) {}
  dim3 block() const { return dim3(width * members, kPixelThreads / (width * members)); }
  unsigned blocks() const { return samples * blocks_of_sample(); }
  __host__ __device__ unsigned blocks_of_sample() const { return ceil_div(height, kPixelThreads / members); }
  // Shared memory of a team that reduces k numbers for each of its spots.
  template <class A>
  size_t reduce_bytes(int k) const {
    return width == 1 ? 0 : kPixelThreads * k * sizeof(A);
  }
};

struct Spot {
  int64_t sample, vector;
  int member;
  bool inside;
  __device__ explicit Spot(const Spots& s) {
    const Quotient place = divide(blockIdx.x, s.blocks_of_sample()), thread = divide(threadIdx.x, s.width);
    sample = place.quotient;
    vector = (int64_t{place.remainder} * blockDim.y + threadIdx.y) * s.width + thread.remainder;
    member = thread.quotient;
    inside = vector < s.height;
  }
};

// Calls f(e, value) for the gated values of a thread's channels, e being the pixel of the spot.
template <int V, int P, class T, class F>
__device__ void for_each_gated(const Spots& spots, const Spot& at, const View<const T>& x, const GateValues<T>& gates,
                               F f) {
  if (!at.inside) return;
  const T* const data = x.data + at.sample * x.sample + at.vector * x.vector;
#pragma unroll 2
  for (int64_t column = at.member; column < spots.columns; column += spots.members) {
    const Vec<T, V> v = load<V>(data + column * x.column);
#pragma unroll
    for (int e = 0; e < V; e++) {
      f(e / P, static_cast<Acc<T>>(v.data[e]) * gates[(at.sample * spots.columns + column) * P + e % P]);
    }
  }
}

template <class T, int V, int P>
__global__ void __launch_bounds__(kPixelThreads, 2)
    forward_kernel(View<const T> x, Map y, Spots spots, GateValues<T> gates, int64_t channels) {
  using A = Acc<T>;
  constexpr int E = V / P;
  CB_DYN_SHARED(A, shared);
  const Spot at(spots);
  A sum[E] = {}, most[E];
  for (int e = 0; e < E; e++) most[e] = -INFINITY;
  for_each_gated<V, P>(spots, at, x, gates, [&](int e, A value) {
    sum[e] += value;
    most[e] = Max()(most[e], value);
  });
  team_reduce(sum, spots.width, shared);
  team_reduce(most, spots.width, shared, Max());
  if (at.member != 0 || !at.inside) return;
#pragma unroll
  for (int e = 0; e < E; e++) {
    T* const to = static_cast<T*>(y.data) + at.sample * y.batch + (at.vector * E + e) * y.pixel;
    to[0] = static_cast<T>(sum[e] / static_cast<A>(channels));
    to[y.channel] = static_cast<T>(most[e]);
  }
}

// Of the pixels of a spot: the maximum, the gradient that every channel gets, and what those with the maximum get besides.
template <class A, int E>
struct PixelGradients {
  A max[E], base[E], top[E];

  // Of all channels; every thread of the spot gets it.
  template <class T, int V, int P>
  __device__ void find(const Spots& spots, const Spot& at, const View<const T>& x, const Map& grad,
                       const GateValues<T>& gates, int64_t channels, A* shared) {
    A ties[E] = {}, own[E];
#pragma unroll
    for (int e = 0; e < E; e++) max[e] = -INFINITY;
    for_each_gated<V, P>(spots, at, x, gates, [&](int e, A value) {
      ties[e] = value > max[e] ? 1 : ties[e] + (value == max[e]);
      max[e] = Max()(max[e], value);
    });
#pragma unroll
    for (int e = 0; e < E; e++) {
      own[e] = max[e];
      base[e] = top[e] = 0;
      if (at.member != 0 || !at.inside) continue;  // read once, and handed round by the sums below
      const T* const from =
          static_cast<const T*>(grad.data) + at.sample * grad.batch + (at.vector * E + e) * grad.pixel;
      base[e] = static_cast<A>(from[0]) / static_cast<A>(channels);
      top[e] = static_cast<A>(from[grad.channel]);
    }
    team_reduce(max, spots.width, shared, Max());
#pragma unroll
    for (int e = 0; e < E; e++) ties[e] = own[e] == max[e] ? ties[e] : A(0);
    team_reduce(ties, spots.width, shared);
    team_reduce(base, spots.width, shared);
    team_reduce(top, spots.width, shared);
#pragma unroll
    for (int e = 0; e < E; e++) {
      top[e] /= ties[e];
      if (!(ties[e] > 0)) base[e] = static_cast<A>(NAN);  // a NaN equals nothing, and torch's gradient is NaN there
    }
  }
  // The gradient of a gated value.
  __device__ A operator()(int e, A gated) const { return base[e] + (gated == max[e] ? top[e] : A(0)); }
};

template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads, 2)
    backward_planes_kernel(View<const T> x, Map grad, View<T> grad_x, Spots spots, GateValues<T> gates, Acc<T>* parts) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Spot at(spots);
  PixelGradients<A, V> pixels;
  pixels.template find<T, V, 1>(spots, at, x, grad, gates, spots.columns, shared);
  for (int64_t c = at.member; c < spots.columns; c += spots.members) {
    A sum = 0;
    if (at.inside) {
      const A gate = gates[at.sample * spots.columns + c];
      const int64_t from = at.sample * x.sample + at.vector * x.vector + c * x.column;
      Vec<T, V> v = load<V>(x.data + from);
#pragma unroll
      for (int e = 0; e < V; e++) {
        const A value = static_cast<A>(v.data[e]), d = pixels(e, value * gate);
        v.data[e] = static_cast<T>(d * gate);
        sum += d * value;
      }
      store(grad_x.data + at.sample * grad_x.sample + at.vector * grad_x.vector + c * grad_x.column, v);
    }
    sum = warp_reduce(sum);
    if (threadIdx.x % 32 == 0) parts[blockIdx.x * spots.columns + c] = sum;
  }
}

// The same numbers of each pixel of a map, [kind][sample][pixel].
template <class A>
struct PixelNumbers {
  A* data;
  int64_t count;
};

template <class T, int V>
__global__ void __launch_bounds__(kPixelThreads, 2)
    find_rows_kernel(View<const T> x, Map grad, Spots spots, GateValues<T> gates, PixelNumbers<Acc<T>> out) {
  CB_DYN_SHARED(Acc<T>, shared);
  const Spot at(spots);
  PixelGradients<Acc<T>, 1> pixels;
  pixels.template find<T, V, V>(spots, at, x, grad, gates, spots.columns * V, shared);
  if (at.member != 0 || !at.inside) return;
  const int64_t i = at.sample * spots.height + at.vector;
  out.data[i] = pixels.max[0];
  out.data[out.count + i] = pixels.base[0];
  out.data[2 * out.count + i] = pixels.top[0];
}

template <class T, int V>
__global__ void __launch_bounds__(kStreamThreads, 2)
    backward_rows_kernel(View<const T> x, View<T> grad_x, Tiling tiling, GateValues<T> gates,
                         PixelNumbers<Acc<T>> numbers, Acc<T>* parts) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Place at(tiling, gridDim.x - 1 - blockIdx.x);  // what the pass before has read last is still in the cache
  A gate[V], sums[V] = {};
#pragma unroll
  for (int e = 0; e < V; e++) gate[e] = gates[(int64_t{at.sample} * tiling.columns + at.column) * V + e];
  T* const to = at.in(grad_x);
  const int64_t step = at.step * grad_x.vector, first = at.sample * tiling.height + at.first;
  for_each_vector<V>(at, x, [&](int k, Vec<T, V> v) {
    const int64_t i = first + int64_t{k} * at.step;
    const PixelGradients<A, 1> pixel{
        {numbers.data[i]}, {numbers.data[numbers.count + i]}, {numbers.data[2 * numbers.count + i]}};
#pragma unroll
    for (int e = 0; e < V; e++) {
      const A value = static_cast<A>(v.data[e]), d = pixel(0, value * gate[e]);
      v.data[e] = static_cast<T>(d * gate[e]);
      sums[e] += d * value;
    }
    store(to + k * step, v);
  });
  team_reduce(sums, tiling.width, shared);
  if (at.row != 0 || !at.valid) return;
#pragma unroll
  for (int e = 0; e < V; e++) {
    parts[((int64_t{at.sample} * tiling.chunks + at.chunk) * tiling.columns + at.column) * V + e] = sums[e];
  }
}

template <class T>
const char* forward(const Context& context, const ChannelPoolArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x}, layout)) return error;
  const Spots spots(layout);
  const GateValues<T> gates{{args.channel, args.gate_dtype}};
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const auto kernel = forward_kernel<T, V, P>;
    CB_LAUNCH(kernel, spots.blocks(), spots.block(), spots.reduce_bytes<A>(V / P), stream_of(context),
              layout.view<const T>(args.x), args.y, spots, gates, args.c);
  });
  return launch_error();
}

template <class T>
const char* backward(const Context& context, const ChannelPoolBackwardArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.grad_x}, layout)) return error;
  const Spots spots(layout);
  const Tiling tiling = sum_tiling(layout);
  const GateValues<T> gates{{args.channel, args.gate_dtype}};
  const int64_t along = layout.channels_last ? tiling.chunks : spots.blocks_of_sample(), pixels = args.n * args.hw;
  Workspace<A> workspace(context, 3 * pixels + args.n * along * args.c);
  const PixelNumbers<A> numbers{workspace.take(3 * pixels), pixels};
  A* const parts = workspace.take(args.n * along * args.c);
  const auto x = layout.view<const T>(args.x);
  const auto grad_x = layout.view<T>(args.grad_x);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    if (layout.channels_last) {
      const auto find = find_rows_kernel<T, V>;
      CB_LAUNCH(find, spots.blocks(), spots.block(), 0, stream_of(context), x, args.grad, spots, gates, numbers);
      const auto write = backward_rows_kernel<T, V>;
      CB_LAUNCH(write, tiling.blocks(), tiling.block(), tiling.reduce_bytes<A>(V), stream_of(context), x, grad_x,
                tiling, gates, numbers, parts);
    } else {
      const auto kernel = backward_planes_kernel<T, V>;
      CB_LAUNCH(kernel, spots.blocks(), spots.block(), spots.reduce_bytes<A>(V), stream_of(context), x, args.grad,
                grad_x, spots, gates, parts);
    }
  });
  add_parts<T>(context, parts, args.n, along, args.c, args.grad_channel, args.gate_dtype);
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_channel_pool(const Context& context, const ChannelPoolArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::forward<T>(context, args); });
}

const char* convblocks_channel_pool_backward(const Context& context, const ChannelPoolBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::backward<T>(context, args); });
}
