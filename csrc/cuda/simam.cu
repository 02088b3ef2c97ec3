// SimAM on CUDA. A team keeps a tile of the map in shared memory, so that the map is read once and written once. Where
// planes are larger than a tile, tiles first leave their share of the sums in the workspace (mean and squares together,
// then the sums of the backward), and each pass reads the map again.
#include "../simam.h"

#include "activation.h"
#include "reduce.h"
#include "tile.h"

namespace convblocks::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int64_t kSharedBytes = 99 << 10;  // what a block can have on every GPU from compute capability 8.0 on

enum class Pass {
  whole,    // a tile has all of its planes
  moments,  // mean and squares of a tile
  sums,     // the backward's sums of a tile
  finish
};

// Sums of tiles, each [chunk][plane].
template <class A>
struct Partial {
  A *mean, *squares, *s1, *s2;
};

template <class T, int V, int P>
class Team {
 public:
  using A = Acc<T>;
  static constexpr int kUnroll = V > 1 ? 1 : 2;  // a vector has enough to do at a time
  const Place at;

  // The shared memory of a block for the tiles of `maps` maps, and for reductions.
  __host__ __device__ static int64_t kept_bytes(const Tiling& tiling, int maps) {
    return ceil_div(int64_t{tiling.teams} * maps * tiling.tile_vectors() * sizeof(Vec<T, V>), 16) * 16;
  }
  static int64_t shared_bytes(const Tiling& tiling, int maps) {
    return kept_bytes(tiling, maps) + tiling.reduce_bytes<A>(maps * P);
  }
  // `maps` is the number of maps of which the team keeps its tile.
  __device__ Team(const Tiling& tiling, int64_t pixels, int maps, unsigned char* shared)
      : at(tiling, blockIdx.x), tiling_(tiling), pixels_(pixels) {
    const int vectors = tiling.tile_vectors();
    kept_ = reinterpret_cast<Vec<T, V>*>(shared) + threadIdx.y * maps * vectors + threadIdx.x;
    other_ = vectors;
    scratch_ = reinterpret_cast<A*>(shared + kept_bytes(tiling, maps));
  }
  // Vector k of the thread in the tile of a map: each thread reads only what it has written.
  __device__ Vec<T, V>& kept(int k, int map = 0) const {
    return kept_[map * other_ + k * static_cast<int>(blockDim.x)];
  }

  template <int K>
  __device__ void sum(A (&values)[K]) const {
    team_reduce(values, tiling_.width, scratch_);
  }
  __device__ void put(A* part, const A* values) const {
    if (at.row != 0 || !at.valid) return;
    for (int p = 0; p < P; p++) part[at.chunk * planes() + plane(p)] = values[p];
  }
  // Adds up f(chunk, place of the tile's share) over the tiles of plane p, the thread's part of them.
  template <class F>
  __device__ A merge(int p, F f) const {
    A total = 0;
    for (int chunk = at.row; chunk < tiling_.chunks; chunk += at.step) {
      total += f(chunk, chunk * planes() + plane(p));
    }
    return total;
  }
  // Mean and sum of squared deviations: of the planes from the shares of their tiles, or of the tile alone.
  __device__ void moments(bool from_shares, const Partial<A>& shares, A (&mean)[P], A (&squares)[P]) const {
    const A scale = 1 / (from_shares ? A(pixels_) : pixels_of(at.chunk));
    for (int p = 0; p < P; p++) mean[p] = squares[p] = 0;
    if (from_shares) {
      for (int p = 0; p < P; p++) {
        mean[p] = merge(p, [&](int chunk, int64_t i) { return shares.mean[i] * pixels_of(chunk); });
      }
    } else {
      add_kept(mean, [](int, A value) { return value; });
    }
    sum(mean);
    for (int p = 0; p < P; p++) mean[p] *= scale;
    if (from_shares) {
      for (int p = 0; p < P; p++) {
        squares[p] = merge(p, [&](int chunk, int64_t i) {
          const A d = shares.mean[i] - mean[p];
          return shares.squares[i] + d * d * pixels_of(chunk);
        });
      }
    } else {
      add_kept(squares, [&](int e, A value) {
        const A d = value - mean[e % P];
        return d * d;
      });
    }
    sum(squares);
  }

 private:
  template <class F>
  __device__ void add_kept(A* sums, F f) const {
#pragma unroll kUnroll
    for (int k = 0; k < at.count; k++) {
      const Vec<T, V> v = kept(k);
      add_vector<V, P>(sums, [&](int e) { return f(e, static_cast<A>(v.data[e])); });
    }
  }
  __device__ int64_t planes() const { return int64_t{tiling_.samples} * tiling_.columns * P; }
  __device__ int64_t plane(int p) const { return (int64_t{at.sample} * tiling_.columns + at.column) * P + p; }
  __device__ A pixels_of(int chunk) const {  // of a plane in a tile
    return A(min(int64_t{tiling_.length}, tiling_.height - int64_t{chunk} * tiling_.length) * (V / P));
  }

  const Tiling& tiling_;
  int64_t pixels_;
  int other_;
  Vec<T, V>* kept_;
  A* scratch_;
};

template <class T, int V, int P>
__global__ void __launch_bounds__(kMaxThreads, 1) simam_kernel(Pass pass, View<const T> x, View<T> y, Tiling tiling,
                                                               int64_t pixels, Acc<T> lambda, Partial<Acc<T>> part) {
  using A = Acc<T>;
  [[maybe_unused]] constexpr int kUnroll = Team<T, V, P>::kUnroll;
  CB_DYN_SHARED(unsigned char, shared);
  const Team<T, V, P> team(tiling, pixels, 1, shared);
  const Place& at = team.at;
  for_each_vector<V>(at, x, [&](int k, const Vec<T, V>& v) { team.kept(k) = v; });
  A mean[P], scale[P];
  team.moments(pass == Pass::finish, part, mean, scale);
  if (pass == Pass::moments) {
    team.put(part.mean, mean);
    team.put(part.squares, scale);
    return;
  }
  for (int p = 0; p < P; p++) scale[p] = 1 / (4 * (scale[p] / A(pixels - 1) + lambda));
  T* out = at.in(y);
#pragma unroll kUnroll
  for (int k = 0; k < at.count; k++, out += at.step * y.vector) {
    Vec<T, V> v = team.kept(k);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const A value = static_cast<A>(v.data[e]), d = value - mean[e % P];
      v.data[e] = static_cast<T>(value * sigmoid(d * d * scale[e % P] + A(0.5)));
    }
    store(out, v);
  }
}

// With g the gradient, s the gate, q = 1 / (2 (v + lambda)), t = g x s (1 - s):
//   grad_x = g s + q t d - d 2 q^2 sum(t d^2) / (HW - 1) - q sum(t d) / HW
template <class T, int V, int P>
__global__ void __launch_bounds__(kMaxThreads, 1)
    simam_backward_kernel(Pass pass, View<const T> grad, View<const T> x, View<T> grad_x, Tiling tiling, int64_t pixels,
                          Acc<T> lambda, Partial<Acc<T>> part) {
  using A = Acc<T>;
  [[maybe_unused]] constexpr int kUnroll = Team<T, V, P>::kUnroll;
  CB_DYN_SHARED(unsigned char, shared);
  const Team<T, V, P> team(tiling, pixels, 2, shared);
  const Place& at = team.at;
  for_each_vector<V>(at, x, grad, [&](int k, const Vec<T, V>& v, const Vec<T, V>& g) {
    team.kept(k) = v;
    team.kept(k, 1) = g;
  });
  A mean[P], q[P], s[2 * P];  // s: sum(t d^2), then sum(t d), of each plane
  team.moments(pass != Pass::whole, part, mean, q);
  for (int p = 0; p < P; p++) q[p] = 1 / (2 * (q[p] / A(pixels - 1) + lambda));

  struct Element {
    A d, gs, t;
  };
  const auto element = [&](const Vec<T, V>& v, const Vec<T, V>& g, int e) -> Element {
    const A value = static_cast<A>(v.data[e]), d = value - mean[e % P];
    const A gate = sigmoid(d * d * q[e % P] / 2 + A(0.5)), gs = static_cast<A>(g.data[e]) * gate;
    return {d, gs, gs * value * (1 - gate)};
  };
  for (int p = 0; p < P; p++) s[p] = s[P + p] = 0;
  if (pass == Pass::finish) {
    for (int p = 0; p < P; p++) {
      s[p] = team.merge(p, [&](int, int64_t i) { return part.s1[i]; });
      s[P + p] = team.merge(p, [&](int, int64_t i) { return part.s2[i]; });
    }
  } else {
#pragma unroll kUnroll
    for (int k = 0; k < at.count; k++) {
      const Vec<T, V> v = team.kept(k), g = team.kept(k, 1);
      A vector_s[2 * P] = {};
#pragma unroll
      for (int e = 0; e < V; e++) {
        const auto [d, gs, t] = element(v, g, e);
        vector_s[e % P] += t * d * d;
        vector_s[P + e % P] += t * d;
      }
      for (int p = 0; p < 2 * P; p++) s[p] += vector_s[p];
    }
  }
  team.sum(s);
  if (pass == Pass::sums) {
    team.put(part.s1, s);
    team.put(part.s2, s + P);
    return;
  }
  for (int p = 0; p < P; p++) {
    s[p] *= 2 * q[p] * q[p] / A(pixels - 1);
    s[P + p] *= q[p] / A(pixels);
  }
  T* out = at.in(grad_x);
#pragma unroll kUnroll
  for (int k = 0; k < at.count; k++, out += at.step * grad_x.vector) {
    Vec<T, V> v = team.kept(k);
    const Vec<T, V> g = team.kept(k, 1);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const auto [d, gs, t] = element(v, g, e);
      v.data[e] = static_cast<T>(gs + (q[e % P] * t - s[e % P]) * d - s[P + e % P]);
    }
    store(out, v);
  }
}

// Tiles of whole planes where they fit: as wide as they can be, so that neighbours in memory are read together.
template <class T, int V, int P>
Tiling simam_tiling(const Layout& layout, int maps) {
  const auto tiling = [&](int width, int64_t chunks) {
    const int64_t vectors = ceil_div(layout.height, chunks) * width;
    const int64_t warps = std::min<int64_t>(ceil_div(vectors, 256), kMaxThreads / 32);
    return Tiling(layout, width, warps * 32, chunks);
  };
  const int widest = layout.channels_last ? tile_width(layout, V > 1 ? 8 : 32) : 1;
  const int narrowest = V > 1 ? 1 : std::min<int>(widest, 32 / sizeof(T));  // a sector of memory
  for (int width = widest; width >= narrowest; width /= 2) {
    const Tiling whole = tiling(width, 1);
    if (Team<T, V, P>::shared_bytes(whole, maps) <= kSharedBytes) return whole;
  }
  return tiling(widest, ceil_div(layout.height * widest * maps * sizeof(Vec<T, V>), 32 << 10));
}

template <class T, int V, int P, class... Parameters, class... Arguments>
void launch(const Context& context, const Tiling& tiling, int maps, void (*kernel)(Parameters...),
            Arguments... arguments) {
  const auto bytes = static_cast<int>(Team<T, V, P>::shared_bytes(tiling, maps));
  if (bytes > 48 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  CB_LAUNCH(kernel, tiling.blocks(), tiling.block(), bytes, stream_of(context), arguments...);
}

template <class T>
const char* run(const Context& context, const SimamArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.y}, layout)) return error;
  const auto x = layout.view<const T>(args.x);
  const auto y = layout.view<T>(args.y);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const Tiling tiling = simam_tiling<T, V, P>(layout, 1);
    const auto pass = [&](Pass pass, const Partial<A>& part) {
      launch<T, V, P>(context, tiling, 1, simam_kernel<T, V, P>, pass, x, y, tiling, args.hw, A(args.e_lambda), part);
    };
    if (tiling.chunks == 1) return pass(Pass::whole, {});
    const int64_t shares = args.n * args.c * tiling.chunks;
    Workspace<A> workspace(context, 2 * shares);
    const Partial<A> part{workspace.take(shares), workspace.take(shares), nullptr, nullptr};
    pass(Pass::moments, part);
    pass(Pass::finish, part);
  });
  return launch_error();
}

template <class T>
const char* run_backward(const Context& context, const SimamBackwardArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.grad, args.x, args.grad_x}, layout))
    return error;
  const auto grad = layout.view<const T>(args.grad), x = layout.view<const T>(args.x);
  const auto grad_x = layout.view<T>(args.grad_x);
  with_shape<T>(layout, [&]<int V, int P>(Shape<V, P>) {
    const Tiling tiling = simam_tiling<T, V, P>(layout, 2);
    const A lambda = args.e_lambda;
    const auto pass = [&](Pass pass, const Partial<A>& part) {
      launch<T, V, P>(context, tiling, 2, simam_backward_kernel<T, V, P>, pass, grad, x, grad_x, tiling, args.hw,
                      lambda, part);
    };
    if (tiling.chunks == 1) return pass(Pass::whole, {});
    const int64_t shares = args.n * args.c * tiling.chunks;
    Workspace<A> workspace(context, 4 * shares);
    const Partial<A> part{workspace.take(shares), workspace.take(shares), workspace.take(shares),
                          workspace.take(shares)};
    launch<T, V, P>(context, tiling, 1, simam_kernel<T, V, P>, Pass::moments, x, grad_x, tiling, args.hw, lambda, part);
    pass(Pass::sums, part);
    pass(Pass::finish, part);
  });
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_simam(const Context& context, const SimamArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::run<T>(context, args); });
}

const char* convblocks_simam_backward(const Context& context, const SimamBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::run_backward<T>(context, args); });
}
