// Concurrent spatial and channel squeeze-and-excitation on CUDA. The gates of the channels are squeeze-and-excitation's
// (layers.h). A block that has all channels of a pixel computes the pixel's gate of what it has read and keeps on chip.
// Forward: pool, layers, and a pass that gates. Backward: a pass that pools x and grad * x, layers, and a pass that writes
// grad_x and sums for w; where the gradient of the channel gates needs those of the pixels (max, mul), one more before.
#include "../scse.h"

#include "layers.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32;                                            // of a block that adds up rows, channels across
constexpr size_t kSharedBytes = 48 << 10, kGoodSharedBytes = 32 << 10;  // the latter for several blocks at a time

enum class Pass { apply, gates, gradient };

// How a block walks: tiles of all channels x some pixels. Threads lie `width` lanes across neighbours in memory: pixels
// in NCHW, and then `rows` channels at a time; channels in channels_last, and then `rows` pixels.
struct Walk {
  bool channels_last;
  int samples, columns, channels;
  int64_t height;             // vectors of a column, as in Layout
  int width, threads, turns;  // turns: vectors of a thread in a tile
  int tiles, chunks, length;  // of a sample; its blocks; tiles of a block
  int maps;                   // that are kept on chip
  bool kept, shared_sums;
  int vector_bytes, numbers, number_bytes;  // numbers: of a pixel vector that are reduced

  __host__ __device__ int rows() const { return threads / width; }
  __host__ __device__ int copies() const { return channels_last ? threads / 32 : 1; }  // of the channels' sums
  size_t reduce_bytes() const { return channels_last ? 0 : size_t(threads / 32) * width * numbers * number_bytes; }
  size_t sum_bytes() const { return shared_sums ? size_t(copies()) * channels * number_bytes : 0; }
  size_t kept_bytes() const { return size_t(maps) * turns * threads * vector_bytes; }
  size_t bytes() const { return (kept ? kept_bytes() : 0) + sum_bytes() + reduce_bytes(); }
  unsigned blocks() const { return unsigned(samples) * chunks; }

  void lay_out(int new_width, int new_threads) {
    width = new_width;
    threads = new_threads;
    turns = ceil_div(columns, channels_last ? width : rows());
  }

  Walk(const Layout& l, int maps, bool sums, size_t vector_bytes, size_t number_bytes)
      : channels_last(l.channels_last), samples(l.samples), columns(l.columns), channels(l.columns * l.planes),
        height(l.height), maps(maps), kept(true), shared_sums(sums), vector_bytes(vector_bytes),
        numbers(2 * l.vector / l.planes), number_bytes(number_bytes) {
    if (channels_last) {
      lay_out(tile_width(l, 32), kThreads);
      while (bytes() > kGoodSharedBytes && threads > 32) lay_out(width, threads / 2);
    } else {
      int across = 1, rows = 1;
      while (across < (l.vectors ? 8 : 32) && across < height) across *= 2;
      while (rows < kThreads / across && rows < columns) rows *= 2;
      while (across < 32 && across * rows < 128 && across < height) across *= 2;
      lay_out(across, std::max(32, across * rows));
      const int sector = std::max<int>(1, 32 / vector_bytes);
      while (bytes() > kGoodSharedBytes && width > sector) lay_out(width / 2, threads);
    }
    kept = bytes() <= kSharedBytes;
    shared_sums = sums && bytes() <= kSharedBytes;
    if (sums && !shared_sums) lay_out(width, channels_last ? 32 : threads);  // one copy, where the rows lie
    tiles = ceil_div(height, channels_last ? rows() : width);
    length = ceil_div(tiles, std::clamp<int64_t>(ceil_div(1024, samples), 1, tiles));
    chunks = ceil_div(tiles, length);
  }
};

// What the passes read and write. Sums lie in rows, one for each chunk and sample.
template <class T>
struct Gating {
  using A = Acc<T>;
  View<const T> x, grad, grad_spatial;
  View<T> out, out_spatial;
  Parameter<T> w, b;
  Combine combine;
  const A *gates, *squeezed;  // [sample][channel]; null without channel gates
  A mean_scale;
  A *sums, *bias;

  __device__ A combined(A x, A s, A q) const {
    switch (combine) {
      case Combine::max: return Max()(x * s, x * q);
      case Combine::mul: return (x * s) * (x * q);
      case Combine::spatial: return x * q;
      default: return x * s + x * q;
    }
  }
  // The gradients of x s and of x q.
  __device__ void slopes(A g, A g_spatial, A x, A s, A q, A& by_channel, A& by_spatial) const {
    by_channel = g;
    by_spatial = g_spatial;
    if (combine == Combine::max) {
      const A a = x * s, b = x * q, half = a == b ? g / 2 : g;
      by_channel = a < b ? A(0) : half;
      by_spatial = a > b ? A(0) : half;
    } else if (combine == Combine::mul) {
      by_channel = g * (x * q);
      by_spatial = g * (x * s);
    }
  }
};

template <class T, int V, int P, Pass kPass>
__global__ void __launch_bounds__(kThreads, 2) gate_kernel(Gating<T> f, Walk walk) {
  using A = Acc<T>;
  constexpr int Q = V / P;  // pixels of a vector
  constexpr bool kBackward = kPass != Pass::apply;
  using Vector = Vec<T, V>;
  CB_DYN_SHARED(Vector, shared);
  Vector* const kept = shared + threadIdx.x;
  A* const sums_on_chip = reinterpret_cast<A*>(shared + (walk.kept ? walk.maps * walk.turns * walk.threads : 0));
  A* const reducing = sums_on_chip + (walk.shared_sums ? walk.copies() * walk.channels : 0);
  const Quotient place = divide(gridDim.x - 1 - blockIdx.x, walk.chunks), thread = divide(threadIdx.x, walk.width);
  const int sample = place.quotient, chunk = place.remainder, row = thread.quotient, lane = thread.remainder;
  const int first = walk.channels_last ? lane : row, step = walk.channels_last ? walk.width : walk.rows();
  const int64_t own_row = int64_t{chunk} * walk.samples + sample;
  const int64_t plane = int64_t{sample} * walk.channels;
  const bool two_grads = f.combine == Combine::concat;
  A* const sums = walk.shared_sums ? sums_on_chip : f.sums + own_row * walk.channels;
  if constexpr (kBackward) {
    for (int i = threadIdx.x; i < (walk.shared_sums ? walk.copies() : 1) * walk.channels; i += walk.threads)
      sums[i] = 0;
    __syncthreads();
  }
  const A bias = f.b ? f.b[0] : A(0);
  A bias_sum = 0;

  for (int tile = chunk * walk.length; tile < min(walk.tiles, (chunk + 1) * walk.length); tile++) {
    const int64_t pixel = walk.channels_last ? int64_t{tile} * walk.rows() + row : int64_t{tile} * walk.width + lane;
    const auto at = [&](const auto& map, int column) {
      return map.data + sample * map.sample + column * map.column + pixel * map.vector;
    };
    const auto valid = [&](int k) { return pixel < walk.height && first + k * step < walk.columns; };
    // The vector of turn k of map m: from the chip, or where it does not fit, once more.
    const auto vector = [&](int m, const View<const T>& map, int k) {
      return walk.kept ? kept[(m * walk.turns + k) * walk.threads] : load<V>(at(map, first + k * step));
    };
    A totals[2 * Q] = {};  // of w x, and of the gradients of the pixels' gates
    A *const z = totals, *const t = totals + Q;
    const auto see = [&](int k, bool crossed) {
      const int column = first + k * step;
      const Vec<T, V> x = crossed ? vector(0, f.x, k) : load<V>(at(f.x, column));
      if (!crossed) {
        if (walk.kept) kept[k * walk.threads] = x;
#pragma unroll
        for (int e = 0; e < V; e++) z[e / P] += static_cast<A>(x.data[e]) * f.w[int64_t{column} * P + e % P];
      }
      if constexpr (kPass == Pass::gradient) {
        const Vec<T, V> g = crossed ? vector(1, f.grad, k) : load<V>(at(f.grad, column));
        Vec<T, V> gs = g;
        if (two_grads) gs = load<V>(at(f.grad_spatial, column));
        if (walk.kept && !crossed) {
          kept[(walk.turns + k) * walk.threads] = g;
          if (two_grads) kept[(2 * walk.turns + k) * walk.threads] = gs;
        }
#pragma unroll
        for (int e = 0; e < V; e++) {
          A by_spatial = static_cast<A>(gs.data[e]);
          if (f.combine == Combine::mul || f.combine == Combine::max) {
            if (!crossed) continue;
            A by_channel;
            const A s = f.gates[plane + int64_t{column} * P + e % P], v = static_cast<A>(x.data[e]);
            f.slopes(static_cast<A>(g.data[e]), 0, v, s, z[e / P], by_channel, by_spatial);
          }
          t[e / P] += by_spatial * static_cast<A>(x.data[e]);
        }
      } else if constexpr (kPass == Pass::gates) {
        if (walk.kept) kept[(walk.turns + k) * walk.threads] = load<V>(at(f.grad, column));
      }
    };
    const auto reduce = [&]() {
      if (walk.channels_last) {
#pragma unroll
        for (int i = 0; i < 2 * Q; i++) totals[i] = warp_reduce(totals[i], 1, Sum(), walk.width);
      } else {
        team_reduce(totals, walk.width, reducing);
      }
    };
#pragma unroll 4
    for (int k = 0; k < walk.turns; k++) {
      if (valid(k)) see(k, false);
    }
    reduce();
#pragma unroll
    for (int i = 0; i < Q; i++) z[i] = sigmoid(z[i] + bias);  // the gates q from here on
    if (kPass == Pass::gradient && (f.combine == Combine::mul || f.combine == Combine::max)) {
      A q[Q];
#pragma unroll
      for (int i = 0; i < Q; i++) {
        q[i] = z[i];
        t[i] = 0;
      }
      for (int k = 0; k < walk.turns; k++) {
        if (valid(k)) see(k, true);
      }
      reduce();
#pragma unroll
      for (int i = 0; i < Q; i++) z[i] = q[i];
    }
    if constexpr (kPass == Pass::gradient) {
#pragma unroll
      for (int i = 0; i < Q; i++) {
        t[i] *= (1 - z[i]) * z[i];  // the gradients of the logits from here on
        if (pixel < walk.height && first == 0) bias_sum += t[i];
      }
    }

#pragma unroll 2
    for (int k = 0; k < walk.turns; k++) {
      const int column = first + k * step;
      A own[P] = {};  // for the sums of the channels
      if (valid(k)) {
        const Vec<T, V> x = vector(0, f.x, k);
        Vec<T, V> g = x, gs = x, out, out_spatial;
        if constexpr (kBackward) gs = g = vector(1, f.grad, k);
        if (kPass == Pass::gradient && two_grads) gs = vector(2, f.grad_spatial, k);
#pragma unroll
        for (int e = 0; e < V; e++) {
          const int64_t channel = int64_t{column} * P + e % P;
          const A v = static_cast<A>(x.data[e]), q = z[e / P], s = f.gates ? f.gates[plane + channel] : A(0);
          if constexpr (kPass == Pass::apply) {
            out.data[e] = static_cast<T>(two_grads ? v * s : f.combined(v, s, q));
            out_spatial.data[e] = static_cast<T>(v * q);
          } else {
            A by_channel, by_spatial;
            f.slopes(static_cast<A>(g.data[e]), static_cast<A>(gs.data[e]), v, s, q, by_channel, by_spatial);
            if constexpr (kPass == Pass::gates) {
              own[e % P] += by_channel * v;
            } else {
              own[e % P] += t[e / P] * v;
              A grad = by_spatial * q + t[e / P] * f.w[channel];
              if (f.gates) grad += by_channel * s + f.squeezed[plane + channel] * f.mean_scale;
              out.data[e] = static_cast<T>(grad);
            }
          }
        }
        if constexpr (kPass != Pass::gates) {
          store(at(f.out, column), out);
          if (kPass == Pass::apply && two_grads) store(at(f.out_spatial, column), out_spatial);
        }
      }
      if constexpr (kBackward) {
#pragma unroll
        for (int p = 0; p < P; p++) {
          const A total =
              walk.channels_last ? warp_reduce(own[p], walk.width) : warp_reduce(own[p], 1, Sum(), walk.width);
          const bool keeps = walk.channels_last ? static_cast<int>(threadIdx.x % 32) < walk.width : lane == 0;
          const int copy = walk.channels_last ? threadIdx.x / 32 : 0;
          if (keeps && column < walk.columns) sums[copy * walk.channels + column * P + p] += total;
        }
      }
    }
  }
  if constexpr (!kBackward) return;
  __syncthreads();
  if (walk.shared_sums) {
    for (int i = threadIdx.x; i < walk.channels; i += walk.threads) {
      A total = sums[i];
      for (int copy = 1; copy < walk.copies(); copy++) total += sums[copy * walk.channels + i];
      f.sums[own_row * walk.channels + i] = total;
    }
  }
  if constexpr (kPass == Pass::gradient) {
    A total[1] = {bias_sum};
    __syncthreads();
    team_reduce(total, 1, reinterpret_cast<A*>(shared));
    if (threadIdx.x == 0) f.bias[own_row] = total[0];
  }
}

// The gradients of w and, as one more channel, of b: the sums of the rows.
template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const Acc<T>* sums, const Acc<T>* bias, int64_t rows,
                                                        int64_t channels, Parameter<T> grad_w, Parameter<T> grad_b) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const int64_t channel = int64_t{blockIdx.x} * kColumns + threadIdx.x % kColumns;
  const int own_row = threadIdx.x / kColumns;
  A total[1] = {};
  if (channel <= channels) {
    for (int64_t row = own_row; row < rows; row += kThreads / kColumns) {
      total[0] += channel < channels ? sums[row * channels + channel] : bias[row];
    }
  }
  team_reduce(total, kColumns, shared);
  if (own_row != 0) return;
  if (channel < channels) grad_w.set(channel, total[0]);
  if (channel == channels && grad_b) grad_b.set(0, total[0]);
}

template <class T, Pass kPass>
void run(const Context& context, const Layout& layout, const Gating<T>& f, const Walk& walk) {
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const auto kernel = gate_kernel<T, V, P, kPass>;
    const size_t least = kThreads / 32 * sizeof(Acc<T>);  // of the sum for b
    CB_LAUNCH(kernel, walk.blocks(), walk.threads, std::max(walk.bytes(), least), stream_of(context), f, walk);
  });
}

template <class T, class Args>
Gating<T> gating(const Layout& layout, const Args& args) {
  Gating<T> f{};
  f.x = layout.view<const T>(args.x);
  f.w = {args.w, args.channel.dtype};
  f.b = {args.b, args.channel.dtype};
  f.combine = args.combine;
  f.mean_scale = Acc<T>(1) / args.hw;
  return f;
}

template <class T>
Walk walk_of(const Layout& layout, int maps, bool sums) {
  return Walk(layout, maps, sums, layout.vector * sizeof(T), sizeof(Acc<T>));
}

template <class T>
const char* forward(const Context& context, const ScseArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.y, args.y_spatial}, layout))
    return error;
  Gating<T> f = gating<T>(layout, args);
  if (args.combine != Combine::spatial) {
    const Tiling tiling = sum_tiling(layout);
    const Layers<T> layers(context, args.n, args.c, args.channel);
    const int64_t planes = args.n * args.c;
    Workspace<A> workspace(context, Pooled<A>::size(planes, tiling.chunks, false, false) + layers.size(false));
    const Pooled<A> pooled(workspace, planes, args.hw, tiling.chunks, false, false);
    pool<T>(context, layout, tiling, args.x, nullptr, pooled);
    f.gates = layers.gates(workspace, layers.hidden(workspace, pooled));
  }
  f.out = layout.view<T>(args.y);
  f.out_spatial = layout.view<T>(args.y_spatial);
  run<T, Pass::apply>(context, layout, f, walk_of<T>(layout, 1, false));
  return launch_error();
}

template <class T>
const char* backward(const Context& context, const ScseBackwardArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error =
          find_layout<T>(args.n, args.c, args.hw, {args.grad, args.grad_spatial, args.x, args.grad_x}, layout))
    return error;
  const bool spatial = args.combine == Combine::spatial;
  const bool crossed = args.combine == Combine::max || args.combine == Combine::mul;
  const Tiling tiling = sum_tiling(layout);
  const Walk crossing = walk_of<T>(layout, 2, true);
  const Walk walk = walk_of<T>(layout, args.combine == Combine::concat ? 3 : 2, true);
  const Layers<T> layers(context, args.n, args.c, args.channel);
  const int64_t planes = args.n * args.c, rows = args.n * walk.chunks;
  int64_t size = rows * (args.c + 1);
  if (!spatial) size += Pooled<A>::size(planes, tiling.chunks, !crossed, false) + layers.size(true);
  if (crossed) size += planes * crossing.chunks + layers.size(false);
  Workspace<A> workspace(context, size);

  Gating<T> f = gating<T>(layout, args);
  f.grad = layout.view<const T>(args.grad);
  f.grad_spatial = layout.view<const T>(args.grad_spatial);
  if (!spatial) {
    const Pooled<A> pooled(workspace, planes, args.hw, tiling.chunks, !crossed, false);
    pool<T>(context, layout, tiling, args.x, crossed ? nullptr : &args.grad, pooled);
    Pooled<A> dots = pooled;
    if (crossed) {
      f.gates = layers.gates(workspace, layers.hidden(workspace, pooled));
      f.sums = workspace.take(planes * crossing.chunks);
      run<T, Pass::gates>(context, layout, f, crossing);
      dots.dot = f.sums;
      dots.chunks = crossing.chunks;
    }
    const auto [gates, squeezed] =
        layers.backward(workspace, pooled, dots, {args.grad_w1, args.grad_b1, args.grad_w2, args.grad_b2});
    f.gates = gates;
    f.squeezed = squeezed;
  }
  f.sums = workspace.take(rows * args.c);
  f.bias = workspace.take(rows);
  f.out = layout.view<T>(args.grad_x);
  run<T, Pass::gradient>(context, layout, f, walk);
  const Parameter<T> grad_w(args.grad_w, args.channel.dtype), grad_b(args.grad_b, args.channel.dtype);
  CB_LAUNCH(rows_kernel<T>, ceil_div(args.c + 1, kColumns), kThreads, kThreads / 32 * kColumns * sizeof(A),
            stream_of(context), f.sums, f.bias, rows, args.c, grad_w, grad_b);
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_scse(const Context& context, const ScseArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::forward<T>(context, args); });
}

const char* convblocks_scse_backward(const Context& context, const ScseBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::backward<T>(context, args); });
}
