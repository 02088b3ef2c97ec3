// The two passes over a map. Pooling reads it once; applying the gates reads and writes it once, from the end to the
// beginning.
#include "squeeze.h"

namespace convblocks::cuda {
namespace {

// Maximum and ties are always found, as they cost less than the reading, but reduced only where they are wanted.
template <class T, int V, int P, bool kTies, bool kDot>
__global__ void __launch_bounds__(kStreamThreads, 2)
    pool_kernel(View<const T> x, View<const T> grad, Tiling tiling, Pooled<Acc<T>> out) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Place at(tiling, blockIdx.x);
  A sums[P * (1 + kDot)] = {};  // of x, then of grad * x
  A max[P], ties[P] = {};
  for (int p = 0; p < P; p++) max[p] = -INFINITY;
  const auto see = [&](const Vec<T, V>& v) {
    add_vector<V, P>(sums, [&](int e) { return static_cast<A>(v.data[e]); });
#pragma unroll
    for (int e = 0; e < V; e++) {
      const A value = static_cast<A>(v.data[e]);
      if (kTies) ties[e % P] = value > max[e % P] ? 1 : ties[e % P] + (value == max[e % P]);
      max[e % P] = Max()(max[e % P], value);
    }
  };
  if constexpr (kDot) {
    for_each_vector<V>(at, x, grad, [&](int, const Vec<T, V>& v, const Vec<T, V>& g) {
      see(v);
      add_vector<V, P>(sums + P, [&](int e) { return static_cast<A>(v.data[e]) * static_cast<A>(g.data[e]); });
    });
  } else {
    for_each_vector<V>(at, x, [&](int, const Vec<T, V>& v) { see(v); });
  }
  team_reduce(sums, tiling.width, shared);
  if (out.max) {
    A own[P];
    for (int p = 0; p < P; p++) own[p] = max[p];
    team_reduce(max, tiling.width, shared, Max());
    if constexpr (kTies) {
      for (int p = 0; p < P; p++) ties[p] = own[p] == max[p] ? ties[p] : A(0);
      team_reduce(ties, tiling.width, shared);
    }
  }
  if (at.row != 0 || !at.valid) return;
  for (int p = 0; p < P; p++) {
    const int64_t i = at.chunk * out.planes + (int64_t{at.sample} * tiling.columns + at.column) * P + p;
    out.sum[i] = sums[p];
    if constexpr (kDot) out.dot[i] = sums[P + p];
    if (out.max) {
      out.max[i] = max[p];
      if constexpr (kTies) out.ties[i] = ties[p];
    }
  }
}

template <class T, int V, int P, bool kIn, bool kMax>
__global__ void __launch_bounds__(kStreamThreads, 2)
    apply_kernel(View<const T> in, View<const T> x, View<T> out, Tiling tiling, Changes<T> source) {
  using A = Acc<T>;
  CB_DYN_SHARED(Change<A>, changes);
  const unsigned block = gridDim.x - 1 - blockIdx.x;  // what the pass before has read last is still in the cache
  const int tile_planes = tiling.width * P, planes = tiling.teams * tile_planes;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, lanes = source.lanes();
  const int at_a_time = tiling.threads * tiling.teams / lanes;
  const int channels = tiling.columns * P;
  for (int i = thread / lanes; i - thread % 32 / lanes < planes; i += at_a_time) {  // a warp stays together
    const Quotient team = divide(i, tile_planes), group = divide(block * tiling.teams + team.quotient, tiling.groups);
    const int sample = divide(group.quotient, tiling.chunks).quotient;
    const int channel = group.remainder * tile_planes + team.remainder;
    const bool valid = i < planes && sample < tiling.samples && channel < channels;
    const Change<A> change = source(valid ? sample : 0, valid ? channel : 0, channels, thread % lanes);
    if (valid && thread % lanes == 0) changes[i] = change;
  }
  __syncthreads();
  const Place at(tiling, block);
  if (at.count == 0) return;
  Change<A> mine[P];
  for (int p = 0; p < P; p++) mine[p] = changes[threadIdx.y * tile_planes + at.lane * P + p];
  T* const p = at.in(out);
  const int64_t step = at.step * out.vector;
  if constexpr (!kIn) {
    for_each_vector<V>(at, x, [&](int k, Vec<T, V> v) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        const Change<A>& c = mine[e % P];
        v.data[e] = static_cast<T>(static_cast<A>(v.data[e]) == c.max ? c.shift + c.at_max : c.shift);
      }
      store(p + k * step, v);
    });
  } else if constexpr (kMax) {
    for_each_vector<V>(at, in, x, [&](int k, Vec<T, V> v, const Vec<T, V>& xs) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        const Change<A>& c = mine[e % P];
        const A shift = static_cast<A>(xs.data[e]) == c.max ? c.shift + c.at_max : c.shift;
        v.data[e] = static_cast<T>(static_cast<A>(v.data[e]) * c.scale + shift);
      }
      store(p + k * step, v);
    });
  } else {
    for_each_vector<V>(at, in, [&](int k, Vec<T, V> v) {
#pragma unroll
      for (int e = 0; e < V; e++) {
        v.data[e] = static_cast<T>(static_cast<A>(v.data[e]) * mine[e % P].scale + mine[e % P].shift);
      }
      store(p + k * step, v);
    });
  }
}

}  // namespace

template <class T>
void pool(const Context& context, const Layout& layout, const Tiling& tiling, const Map& x, const Map* grad,
          const Pooled<Acc<T>>& pooled) {
  const auto xs = layout.view<const T>(x), gs = layout.view<const T>(grad ? *grad : x);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const auto kernel = grad          ? pool_kernel<T, V, P, true, true>
                        : pooled.ties ? pool_kernel<T, V, P, true, false>
                                      : pool_kernel<T, V, P, false, false>;
    CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), tiling.reduce_bytes<Acc<T>>(grad ? 2 * P : P),
              stream_of(context), xs, gs, tiling, pooled);
  });
}

template <class T>
void apply(const Context& context, const Layout& layout, const Map& in, const Map& x, const Map& out,
           const Changes<T>& changes) {
  const Tiling tiling = map_tiling(layout);
  const auto ins = layout.view<const T>(in), xs = layout.view<const T>(x);
  const auto outs = layout.view<T>(out);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const auto kernel = !in.data             ? apply_kernel<T, V, P, false, true>
                        : changes.pooled.max ? apply_kernel<T, V, P, true, true>
                                             : apply_kernel<T, V, P, true, false>;
    CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), tiling.teams * tiling.width * P * sizeof(Change<Acc<T>>),
              stream_of(context), ins, xs, outs, tiling, changes);
  });
}

#define CONVBLOCKS_SQUEEZE(T)                                                                                         \
  template void pool<T>(const Context&, const Layout&, const Tiling&, const Map&, const Map*, const Pooled<Acc<T>>&); \
  template void apply<T>(const Context&, const Layout&, const Map&, const Map&, const Map&, const Changes<T>&);
CONVBLOCKS_SQUEEZE(float)
CONVBLOCKS_SQUEEZE(double)
CONVBLOCKS_SQUEEZE(f16)
CONVBLOCKS_SQUEEZE(bf16)

}  // namespace convblocks::cuda
