// Channel shuffle on CUDA: values are moved as they are, in vectors. NCHW: a thread moves a vector of a plane.
// channels_last: a pixel is a matrix of groups x width channels, and a thread transposes a piece of it that is as long as
// a vector and has all of the shorter side; where that side is no small constant, it fetches one channel.
#include "../channel_shuffle.h"

#include <algorithm>

#include "tile.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = 256;

// Where channel c of the result comes from.
template <class Index>
__device__ int64_t source_of(Index c, Index groups, Index channels) {
  return static_cast<int64_t>(c % groups * (channels / groups) + c / groups);
}

// `length` vectors for each of `rows`, which are the planes or the pixels of a sample.
template <class Index>
struct Grid {
  Index total, length, rows;

  __host__ unsigned blocks() const { return ceil_div(total, kThreads); }
  struct Item {
    int64_t sample, row, at;
    bool valid;
  };
  __device__ Item item() const {
    const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x, row = i / length;
    return {static_cast<int64_t>(row / rows), static_cast<int64_t>(row % rows), static_cast<int64_t>(i % length),
            i < total};
  }
};

template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) planes_kernel(View<const T> x, View<T> y, Grid<Index> grid, Index groups) {
  const auto [sample, c, at, valid] = grid.item();
  if (!valid) return;
  const int64_t source = source_of<Index>(c, groups, grid.rows);
  store(y.data + sample * y.sample + c * y.column + at * V,
        load<V>(x.data + sample * x.sample + source * x.column + at * V));
}

template <class T, class Index>
__global__ void __launch_bounds__(kThreads)
    channels_kernel(View<const T> x, View<T> y, Grid<Index> grid, Index groups) {
  const auto [sample, pixel, c, valid] = grid.item();
  if (!valid) return;
  const int64_t source = source_of<Index>(c, groups, grid.length);
  y.data[sample * y.sample + pixel * y.vector + c] = x.data[sample * x.sample + pixel * x.vector + source];
}

// FEW groups, or width FEW: then the other way.
template <class T, int V, int FEW, bool GROUPS_ARE_FEW, class Index>
__global__ void __launch_bounds__(kThreads) matrix_kernel(View<const T> x, View<T> y, Grid<Index> grid) {
  const auto [sample, pixel, at, valid] = grid.item();
  if (!valid) return;
  const T* from = x.data + sample * x.sample + pixel * x.vector;
  T* to = y.data + sample * y.sample + pixel * y.vector;
  const int64_t many = static_cast<int64_t>(grid.length) * V, m = at * V;
  // Vector k of the piece, on either side: a row of the matrix, or a stretch of its columns.
  const auto row = [&](int k) { return k * many + m; };
  const auto stretch = [&](int k) { return m * FEW + k * V; };
  Vec<T, V> in[FEW], out;
#pragma unroll
  for (int k = 0; k < FEW; k++) in[k] = load<V>(from + (GROUPS_ARE_FEW ? row(k) : stretch(k)));
#pragma unroll
  for (int k = 0; k < FEW; k++) {
#pragma unroll
    for (int e = 0; e < V; e++) {
      const int i = GROUPS_ARE_FEW ? (k * V + e) % FEW * V + (k * V + e) / FEW : e * FEW + k;
      out.data[e] = in[i / V].data[i % V];
    }
    store(to + (GROUPS_ARE_FEW ? stretch(k) : row(k)), out);
  }
}

template <class T, int V, class Index>
void launch(const Context& context, const ChannelShuffleArgs& args, bool channels_last, const View<const T>& x,
            const View<T>& y) {
  const auto stream = stream_of(context);
  const auto grid_of = [&](int64_t rows, int64_t length) {
    return Grid<Index>{static_cast<Index>(args.n * rows * length), static_cast<Index>(length),
                       static_cast<Index>(rows)};
  };
  const Index groups = args.groups;
  if (!channels_last) {
    const auto grid = grid_of(args.c, args.hw / V);
    CB_LAUNCH((planes_kernel<T, V, Index>), grid.blocks(), kThreads, 0, stream, x, y, grid, groups);
    return;
  }
  const int64_t width = args.c / args.groups, few = std::min(args.groups, width), many = std::max(args.groups, width);
  const auto matrix = [&]<int W, int FEW>(std::integral_constant<int, W>, std::integral_constant<int, FEW>) {
    const auto grid = grid_of(args.hw, many / W);
    if (few == args.groups) {
      CB_LAUNCH((matrix_kernel<T, W, FEW, true, Index>), grid.blocks(), kThreads, 0, stream, x, y, grid);
    } else {
      CB_LAUNCH((matrix_kernel<T, W, FEW, false, Index>), grid.blocks(), kThreads, 0, stream, x, y, grid);
    }
  };
  const auto constant = [&]<int FEW>(std::integral_constant<int, FEW> size) {
    constexpr int W = V * FEW > 32 ? 32 / FEW : V;  // what a thread holds without spills
    if (many % W == 0)
      matrix(std::integral_constant<int, W>{}, size);
    else
      matrix(std::integral_constant<int, 1>{}, size);
  };
  switch (few) {
    case 1: return constant(std::integral_constant<int, 1>{});  // a copy
    case 2: return constant(std::integral_constant<int, 2>{});
    case 3: return constant(std::integral_constant<int, 3>{});
    case 4: return constant(std::integral_constant<int, 4>{});
    case 8: return constant(std::integral_constant<int, 8>{});
  }
  const auto grid = grid_of(args.hw, args.c);
  CB_LAUNCH((channels_kernel<T, Index>), grid.blocks(), kThreads, 0, stream, x, y, grid, groups);
}

template <class T>
const char* run(const Context& context, const ChannelShuffleArgs& args) {
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.y}, layout)) return error;
  const auto view = [&]<class E>(const Map& map, std::type_identity<E>) {
    return View<E>{static_cast<E*>(map.data), map.batch, map.channel, map.pixel};
  };
  const auto x = view(args.x, std::type_identity<const T>{});
  const auto y = view(args.y, std::type_identity<T>{});
  const auto indexed = [&]<class Index>(Index) {
    if constexpr (kVector<T> > 1) {
      if (layout.vectors) return launch<T, kVector<T>, Index>(context, args, layout.channels_last, x, y);
    }
    launch<T, 1, Index>(context, args, layout.channels_last, x, y);
  };
  if (args.n * args.c * args.hw < int64_t{1} << 31)
    indexed(uint32_t{});
  else
    indexed(uint64_t{});
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

const char* convblocks_channel_shuffle(const convblocks::Context& context, const convblocks::ChannelShuffleArgs& args) {
  using namespace convblocks;
  switch (args.dtype) {
    case Dtype::f64: return cuda::run<uint64_t>(context, args);
    case Dtype::f32: return cuda::run<uint32_t>(context, args);
    case Dtype::f16:
    case Dtype::bf16: return cuda::run<uint16_t>(context, args);
  }
  return "unknown dtype";
}
