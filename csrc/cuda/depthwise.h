// What the kernels of depthwise convolutions with usual filters share: K x K with stride S in both directions, without
// dilation, one for each channel. A block holds the pixels that its tile needs in shared memory, as numbers of the
// accumulator's type; both layouts look the same from there. A thread has one channel and one column, and kRows rows at
// a time, for which it reads each number of the tile once for each column of the filter.
#pragma once
#include <algorithm>

#include "../depthwise_conv2d.h"
#include "activation.h"
#include "element.h"

namespace convblocks::cuda::depthwise {

constexpr int kRows = 4;
constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 << 10;  // which leaves room for other blocks

template <class T>
struct Planes {
  T* data;
  int64_t batch, channel, pixel;

  explicit Planes(const Map& map)
      : data(static_cast<T*>(map.data)), batch(map.batch), channel(map.channel), pixel(map.pixel) {}
  __host__ __device__ T* at(int64_t n, int64_t c, int64_t i) const {
    return data + n * batch + c * channel + i * pixel;
  }
};

// Whether channels are neighbours in all maps: channels_last. Null if they are of no common layout.
inline const char* find_layout(std::initializer_list<Map> maps, bool& channels_last) {
  bool rows = true, planes = true;
  for (const Map& map : maps) {
    rows &= map.channel == 1;
    planes &= map.pixel == 1;
  }
  channels_last = rows && !planes;
  return rows || planes ? nullptr : "maps of different layouts";
}

// How the tiles of a map lie: `groups` of `channels`, each cut into rows x columns of tiles of height x width results.
struct Tiling {
  bool channels_last;
  int samples, all_channels, h, w, out_h, out_w, top, left;
  int channels, height, width;
  int groups, rows, columns;
  int threads;  // of a channel

  __host__ __device__ int64_t pieces() const { return int64_t{samples} * rows * columns; }
  dim3 block() const { return channels_last ? dim3(threads * channels) : dim3(threads, channels); }
};

// The place of a thread among those of its block.
struct Lane {
  int channel, slot;
  __device__ explicit Lane(const Tiling& t) {
    channel = t.channels_last ? threadIdx.x % t.channels : threadIdx.y;
    slot = t.channels_last ? threadIdx.x / t.channels : threadIdx.x;
  }
};

// A tile in shared memory.
template <class A>
struct Tile {
  A* data;
  int rows, columns, channels;
  int channel, row, column;  // strides

  __host__ __device__ Tile(const Tiling& t, A* data, int rows, int columns)
      : data(data), rows(rows), columns(columns), channels(t.channels), channel(t.channels_last ? 1 : rows * columns),
        row(t.channels_last ? columns * t.channels : columns), column(t.channels_last ? t.channels : 1) {}
  __host__ __device__ int size() const { return rows * columns * channels; }
  __device__ A* at(int c, int r, int w) const { return data + c * channel + r * row + w * column; }
};

// Fills a tile with the pixels from (row, column) of a map of h x w pixels on, zeros outside it, V at a time.
template <int V, class T, class A>
__device__ void fill(const Tile<A>& tile, const Planes<const T>& map, bool channels_last, int64_t sample, int channel,
                     int channels, int row, int column, int h, int w) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  // In channels_last a vector has channels of a pixel; else pixels of a row, from a multiple of V on.
  const int start = channels_last ? column : column - ((column % V) + V) % V;
  const unsigned across = channels_last ? tile.channels / V : (column + tile.columns - start + V - 1) / V;
  const unsigned items = channels_last ? across * tile.columns * tile.rows : across * tile.rows * tile.channels;
  const unsigned middle = channels_last ? tile.columns : tile.rows;
  for (unsigned i = thread; i < items; i += threads) {
    const unsigned rest = i / across, first = i - rest * across, third = rest / middle, second = rest - third * middle;
    const int c = channels_last ? first * V : third, r = channels_last ? third : second;
    const int from_row = row + r, from = channels_last ? column + static_cast<int>(second) : start + int(first) * V;
    Vec<T, V> v{};
    if (c >= channels) continue;
    if (from_row >= 0 && from_row < h && from >= 0 && from < w)
      v = load<V>(map.at(sample, channel + c, int64_t{from_row} * w + from));
    A* const to = tile.at(c, r, from - column);
#pragma unroll
    for (int e = 0; e < V; e++) {
      if (V == 1 || channels_last)
        to[e] = static_cast<A>(v.data[e]);
      else if (from + e >= column && from + e < column + tile.columns)
        to[e] = static_cast<A>(v.data[e]);
    }
  }
}

// Whether vectors of a row, or of a pixel's channels, are aligned in a map with rows of w pixels.
template <class T>
bool aligned(const Map& map, const Tiling& t, int w) {
  constexpr int V = kVector<T>;
  const int64_t apart = t.channels_last ? map.pixel : map.channel;
  return V > 1 && reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && (t.samples == 1 || map.batch % V == 0) &&
         apart % V == 0 && (t.channels_last ? t.all_channels % V == 0 && t.channels % V == 0 : w % V == 0);
}

// The filters of a block's channels in shared memory, tap by tap, and the biases behind them.
template <int K, class A>
struct Filters {
  A* data;
  int tap, channel;  // strides

  __host__ __device__ static int size(const Tiling& t) { return (K * K + 1) * t.channels; }
  template <class T>
  __device__ Filters(const Tiling& t, A* shared, const Parameter<T>& weight, const Parameter<T>& bias, int first)
      : data(shared), tap(t.channels_last ? t.channels : 1), channel(t.channels_last ? 1 : K * K + 1) {
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < size(t); i += blockDim.x * blockDim.y) {
      const int c = i / (K * K + 1), k = i % (K * K + 1);
      if (first + c >= t.all_channels) continue;
      const int64_t at = first + c;
      data[c * channel + k * tap] = k < K * K ? weight[at * K * K + k] : bias ? bias[at] : A(0);
    }
  }
  __device__ A get(int c, int k) const { return data[c * channel + k * tap]; }
  // Whether taps may multiply the zeros outside a map: Inf and NaN must not.
  __device__ bool finite(int c) const {
    A zero = 0;
#pragma unroll
    for (int k = 0; k < K * K; k++) zero += get(c, k) * 0;
    return zero == 0;
  }
};

// The sums of kRows windows, one below the other; the first one starts at (row, column) of the tile, which is the pixel
// (in_row, in_column) of the map.
template <int K, int S, class A>
__device__ void convolve(const Tile<A>& tile, const Filters<K, A>& filters, bool finite, int c, int row, int column,
                         int in_row, int in_column, int h, int w, A (&z)[kRows]) {
  const A* const p = tile.at(c, row, column);
#pragma unroll
  for (int r = 0; r < kRows; r++) z[r] = filters.get(c, K * K);
  if (finite) {
#pragma unroll
    for (int kw = 0; kw < K; kw++) {
      A x[(kRows - 1) * S + K];
#pragma unroll
      for (int i = 0; i < (kRows - 1) * S + K; i++) x[i] = p[i * tile.row + kw * tile.column];
#pragma unroll
      for (int kh = 0; kh < K; kh++) {
        const A weight = filters.get(c, kh * K + kw);
#pragma unroll
        for (int r = 0; r < kRows; r++) z[r] += weight * x[r * S + kh];
      }
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll 1
    for (int k = 0; k < K * K; k++) {
      const int y = r * S + k / K, x = k % K;
      if (in_row + y >= 0 && in_row + y < h && in_column + x >= 0 && in_column + x < w)
        z[r] += filters.get(c, k) * p[y * tile.row + x * tile.column];
    }
  }
}

// Calls f with K and S as constants; false where there are none.
template <class F>
bool with_filter(const DepthwiseConv2dShape& s, F f) {
  const bool square = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w && s.dilation_h == 1 && s.dilation_w == 1;
  constexpr int64_t kMost = int64_t{1} << 20;  // of what is counted in 32 bits
  if (!square || s.multiplier != 1 || s.stride_h > 2 || std::max({s.h, s.w, s.top, s.left}) > kMost ||
      std::max(s.n, s.c) > kMost || s.n * s.c > int64_t{1} << 30)
    return false;
  const auto with_stride = [&]<int K>(std::integral_constant<int, K> k) {
    return s.stride_h == 1 ? f(k, std::integral_constant<int, 1>{}) : f(k, std::integral_constant<int, 2>{});
  };
  switch (s.kernel_h) {
    case 3: return with_stride(std::integral_constant<int, 3>{});
    case 5: return with_stride(std::integral_constant<int, 5>{});
    case 7: return with_stride(std::integral_constant<int, 7>{});
  }
  return false;
}

// The tiles that load least, of those whose shared memory, bytes(tiling), fits; false if none does. `step` pixels of x
// belong to a result if they must be in the tile of one, as in the backward; else 0.
template <class T, class Bytes>
bool find_tiling(const DepthwiseConv2dShape& s, bool channels_last, int step, Bytes bytes, Tiling& best) {
  const auto count = [&](int64_t out, int64_t in, int64_t block) {
    return static_cast<int>(std::max(ceil_div(out, block), step ? ceil_div(in, block * step) : 0));
  };
  const auto most_h = std::max(s.out_h, step ? ceil_div(s.h, step) : 0);
  const auto most_w = std::max(s.out_w, step ? ceil_div(s.w, step) : 0);
  constexpr int kSector = 32 / sizeof(T);
  int64_t least = 0;
  for (int channels = channels_last ? 32 : 1; channels >= (channels_last ? kSector : 1); channels /= 2) {
    if (channels > kSector && channels >= 2 * s.c) continue;
    for (int64_t parts = 1; parts <= std::min<int64_t>(most_w, 64); parts++) {
      for (int64_t height = kRows; height < most_h + kRows && height <= 16 * kRows; height += kRows) {
        Tiling t{channels_last,
                 static_cast<int>(s.n),
                 static_cast<int>(s.c),
                 static_cast<int>(s.h),
                 static_cast<int>(s.w),
                 static_cast<int>(s.out_h),
                 static_cast<int>(s.out_w),
                 static_cast<int>(s.top),
                 static_cast<int>(s.left),
                 channels,
                 static_cast<int>(height),
                 static_cast<int>(ceil_div(most_w, parts)),
                 0,
                 0,
                 0,
                 0};
        const int64_t size = bytes(t);
        if (size > kSharedBytes) break;
        t.rows = count(s.out_h, s.h, t.height);
        t.columns = count(s.out_w, s.w, t.width);
        const int64_t cost = size / channels * t.rows * t.columns;
        if (least && cost >= least) continue;
        least = cost;
        best = t;
      }
    }
  }
  if (!least) return false;
  // Threads for the columns and groups of rows of a channel; of as many planes as fill a block.
  const int64_t items = int64_t{best.width} * (best.height / kRows);
  best.threads = 8;
  if (channels_last) {
    best.threads = kThreads / best.channels;
  } else {
    while (best.threads < kThreads && best.threads < items) best.threads *= 2;
    const auto fits = [&](int channels) {
      Tiling t = best;
      t.channels = channels;
      return channels * best.threads <= kThreads && bytes(t) <= kSharedBytes;
    };
    while (best.channels < s.c && fits(2 * best.channels)) best.channels *= 2;
    while (best.threads * best.channels < 32) best.threads *= 2;
  }
  best.groups = static_cast<int>(ceil_div(s.c, best.channels));
  return true;
}

// What depthwise_backward.cu has: all gradients, by tiles in shared memory; false where no tile fits, or T is double.
template <class T>
bool run_tiles(const Context&, const DepthwiseConv2dBackwardArgs&, bool channels_last);
// The gradients of the filters and biases from `count` shares of them, each [tap][channel], the last tap for the bias.
template <class T>
void add_up(const Context&, const DepthwiseConv2dBackwardArgs&, const Acc<T>* sums, int64_t count);

}  // namespace convblocks::cuda::depthwise
