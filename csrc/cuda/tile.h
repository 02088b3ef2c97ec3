// How blocks share a feature map, the same for both layouts.
//
// A map is columns of vectors. NCHW: a column is a plane, its vectors are V neighbouring pixels. channels_last: a
// column is V neighbouring channels, one vector for each pixel. P is the number of planes in a column: 1 or V. With
// V = 1, which serves what is not aligned to vectors, P = 1 in both. A tile is `width` columns side by side (1 in NCHW;
// in channels_last they lie next to each other in memory) and a stretch of vectors along them: what a team of threads
// reduces or transforms together. A team is one warp, and then a block holds several, or a whole block.
#pragma once
#include <algorithm>

#include "element.h"

namespace convblocks::cuda {

// A map as a kernel sees it; strides in elements.
template <class T>
struct View {
  T* data;
  int64_t sample, column, vector;
};

struct Layout {
  bool channels_last, vectors;
  int vector, planes;                // V, P
  int64_t samples, columns, height;  // columns of a sample, vectors of a column

  template <class T>
  View<T> view(const Map& map) const {
    return {static_cast<T*>(map.data), map.batch, channels_last ? vector : map.channel,
            channels_last ? map.pixel : vector};
  }
};

// The layout that maps of one size share.
template <class T, size_t K>
const char* find_layout(int64_t n, int64_t c, int64_t hw, const Map (&maps)[K], Layout& layout) {
  bool rows = true, planes = true;  // channels lie side by side; pixels do
  for (const Map& map : maps) {
    rows &= map.channel == 1 || c == 1;
    planes &= map.pixel == 1 || hw == 1;
  }
  if (!rows && !planes) return "maps of different layouts";
  // A block's number in its grid has 31 bits, a vector's in its tile has 32.
  if (n * c > 1 << 30) return "more than 2^30 planes";
  if (hw > int64_t{1} << 34) return "more than 2^34 pixels";
  const bool channels_last = rows && (hw == 1 || !planes);
  bool vectors = kVector<T> > 1 && (channels_last ? c : hw) % kVector<T> == 0;
  for (const Map& map : maps) {
    const int64_t apart = channels_last ? map.pixel : map.channel;
    vectors &= reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && (n == 1 || map.batch % kVector<T> == 0) &&
               ((channels_last ? hw : c) == 1 || apart % kVector<T> == 0);
  }
  const int v = vectors ? kVector<T> : 1;
  layout = {
      channels_last, vectors, v, channels_last ? v : 1, n, channels_last ? c / v : c, channels_last ? hw : hw / v};
  return nullptr;
}

template <int VECTOR, int PLANES>
struct Shape {
  static constexpr int V = VECTOR, P = PLANES;
};

// Calls f with the layout's vectors and planes as constants.
template <class T, class F>
void with_shape(const Layout& layout, F f) {
  constexpr int V = kVector<T>;
  if constexpr (V > 1) {
    if (layout.vectors) return layout.channels_last ? f(Shape<V, V>{}) : f(Shape<V, 1>{});
  }
  f(Shape<1, 1>{});
}

struct Tiling {
  int samples, columns;
  int64_t height;
  int groups, chunks, length;  // tiles across a sample; along its columns; vectors along a tile
  int width, threads, teams;   // columns of a tile; threads of a team; teams of a block

  Tiling(const Layout& l, int width, int threads, int64_t least_chunks)
      : samples(l.samples), columns(l.columns), height(l.height), groups(ceil_div(l.columns, width)),
        length(ceil_div(l.height, least_chunks)), width(width), threads(threads), teams(threads == 32 ? 4 : 1) {
    chunks = ceil_div(height, length);
  }
  unsigned blocks() const { return ceil_div(int64_t{samples} * groups * chunks, teams); }
  dim3 block() const { return dim3(threads, teams); }
  __host__ __device__ int tile_vectors() const { return length * width; }
  // Shared memory that a team needs to reduce k numbers for each of its columns (reduce.h).
  template <class A>
  size_t reduce_bytes(int k) const {
    return threads == 32 ? 0 : threads / 32 * width * k * sizeof(A);
  }
};

// The power of two columns, at most `most`, that cover a sample's columns.
inline int tile_width(const Layout& l, int most) {
  int width = 1;
  while (width < most && width < l.columns) width *= 2;
  return width;
}

// Tiles that blocks of at most kStreamThreads threads stream through.
constexpr int kStreamThreads = 256;
inline Tiling stream_tiling(const Layout& layout, int64_t chunks) {
  const int width = layout.channels_last ? tile_width(layout, layout.vectors ? 8 : 32) : 1;
  const int64_t vectors = ceil_div(layout.height, chunks) * width;
  return Tiling(layout, width, std::clamp<int64_t>(ceil_div(vectors, 32 * 8), 1, kStreamThreads / 32) * 32, chunks);
}
// For a pass that sums: few planes are cut into chunks, not into many, as each reader of the sums adds them up again.
inline Tiling sum_tiling(const Layout& layout) {
  const Tiling whole = stream_tiling(layout, 1);
  const int64_t wanted = ceil_div(512, whole.blocks()), most = layout.height * whole.width / (4 * kStreamThreads);
  return stream_tiling(layout, std::clamp<int64_t>(std::min(wanted, most), 1, 16));
}
// For a pass that sums nothing.
inline Tiling map_tiling(const Layout& layout) {
  return stream_tiling(layout, ceil_div(layout.height * stream_tiling(layout, 1).width, 8 * kStreamThreads));
}

struct Quotient {
  int quotient, remainder;
};
__device__ inline Quotient divide(unsigned a, unsigned b) {
  const unsigned quotient = a / b;
  return {static_cast<int>(quotient), static_cast<int>(a - quotient * b)};
}

// The part of a map that a thread works on: `count` vectors of one column, `step` apart.
struct Place {
  int sample, column, chunk;  // column 0 where the tile reaches beyond the last one: count is 0 there
  int64_t first;              // vector of the column
  int count, step;
  int row, lane;  // the thread's place in its team: `lane` across, `row` of `step` along
  bool valid;

  __device__ Place(const Tiling& t, unsigned block) {
    const Quotient group = divide(block * blockDim.y + threadIdx.y, t.groups), part = divide(group.quotient, t.chunks);
    const Quotient thread = divide(threadIdx.x, t.width);
    row = thread.quotient;
    lane = thread.remainder;
    step = divide(blockDim.x, t.width).quotient;
    sample = part.quotient;
    chunk = part.remainder;
    column = group.remainder * t.width + lane;
    valid = sample < t.samples && column < t.columns;
    if (!valid) sample = column = 0;
    first = int64_t{chunk} * t.length + row;
    const auto left = static_cast<int>(min(t.height - first, int64_t{t.length - row}));
    count = valid && left > 0 ? divide(left + step - 1, step).quotient : 0;
  }
  template <class T>
  __device__ T* in(const View<T>& map) const {
    return map.data + sample * map.sample + column * map.column + first * map.vector;
  }
};

// Adds f(element) to the sum of the element's plane, for the elements of a vector: within the vector first, as sums of
// few lose less to rounding.
template <int V, int P, class A, class F>
__device__ void add_vector(A* sums, F f) {
#pragma unroll
  for (int p = 0; p < P; p++) {
    A sum = f(p);
#pragma unroll
    for (int e = p + P; e < V; e += P) sum += f(e);
    sums[p] += sum;
  }
}

// Calls f(k, vector k of each map) for the vectors of a thread, with several loads under way at a time.
template <int V, class T, int K, class F>
__device__ void for_each_vectors(const Place& at, const View<const T> (&maps)[K], F f) {
  constexpr int kBatch = (V > 1 ? 4 : 8) / (K > 2 ? 4 : K);
  const T* p[K];
#pragma unroll
  for (int m = 0; m < K; m++) p[m] = at.in(maps[m]);
  for (int k = 0; k < at.count; k += kBatch) {
    const auto left = min(at.count - k, kBatch);
    Vec<T, V> batch[kBatch][K];
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
#pragma unroll
      for (int m = 0; m < K; m++) {
        if (b < left) batch[b][m] = load<V>(p[m] + b * at.step * maps[m].vector);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; b++) {
      if (b < left) f(k + b, batch[b]);
    }
#pragma unroll
    for (int m = 0; m < K; m++) p[m] += kBatch * at.step * maps[m].vector;
  }
}

// The same for one map, f(k, vector k), and for two: f(k, vector k of one, vector k of the other).
template <int V, class T, class F>
__device__ void for_each_vector(const Place& at, const View<const T>& map, F f) {
  for_each_vectors<V>(at, {map}, [&](int k, const Vec<T, V>(&v)[1]) { f(k, v[0]); });
}
template <int V, class T, class F>
__device__ void for_each_vector(const Place& at, const View<const T>& map, const View<const T>& other, F f) {
  for_each_vectors<V>(at, {map, other}, [&](int k, const Vec<T, V>(&v)[2]) { f(k, v[0], v[1]); });
}

}  // namespace convblocks::cuda
